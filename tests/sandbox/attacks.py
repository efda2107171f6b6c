"""Programs that try to reach what they must not.

Each prints SUCCEEDED where it got through. The test fills in the places marked ``@...@``: a secret file and its folder,
the test's own listeners on the loopback interface, and the process that judges.

The harmless programs first succeed without a sandbox, in a temporary folder, so that their failure inside means
something. Bombs, signals and calls into the kernel's privileged corners never run without limits.
"""

from __future__ import annotations

READING = {
    "open": "print('SUCCEEDED' if 'secret' in open('@secret@').read() else '')",
    "io_open": "import io\nprint('SUCCEEDED' if b'secret' in io.FileIO('@secret@').read() else '')",
    "os_open": "import os\nprint('SUCCEEDED' if os.read(os.open('@secret@', os.O_RDONLY), 6) else '')",
    "pathlib": "import pathlib\nprint('SUCCEEDED' if pathlib.Path('@secret@').read_text() else '')",
    "ctypes_open": """
import ctypes, os
descriptor = ctypes.CDLL(None).open(b'@secret@', 0)
if descriptor >= 0 and os.read(descriptor, 6):
    print('SUCCEEDED')
""",
    "raw_system_call": """
import ctypes, os, platform
number = {'x86_64': 257, 'aarch64': 56}[platform.machine()]
descriptor = ctypes.CDLL(None).syscall(number, -100, b'@secret@', 0, 0)
if descriptor >= 0 and os.read(descriptor, 6):
    print('SUCCEEDED')
""",
    "openat2": """
import ctypes, os, struct
how = struct.pack('QQQ', 0, 0, 0)
descriptor = ctypes.CDLL(None).syscall(437, -100, b'@secret@', how, len(how))
if descriptor >= 0 and os.read(descriptor, 6):
    print('SUCCEEDED')
""",
    "through_proc_root": "print('SUCCEEDED' if open('/proc/self/root@secret@').read() else '')",
    "through_proc_cwd": "print('SUCCEEDED' if open('/proc/self/cwd/' + '../' * 40 + '@secret@').read() else '')",
    "parents_environment": "print('SUCCEEDED' if open('/proc/@judge@/environ').read() else '')",
    "parents_command_line": "print('SUCCEEDED' if open('/proc/@judge@/cmdline').read() else '')",
    "own_memory_map": "print('SUCCEEDED' if open('/proc/self/maps').read() else '')",
    "list_folder": "import os\nprint('SUCCEEDED' if os.listdir('@folder@') else '')",
    "list_root": "import os\nprint('SUCCEEDED' if os.listdir('/') else '')",
    "symbolic_link": "import os\nos.symlink('@secret@', 'link')\nprint('SUCCEEDED' if open('link').read() else '')",
    "symbolic_link_to_folder": """
import os
os.symlink('@folder@', 'link')
print('SUCCEEDED' if open('link/secret.txt').read() else '')
""",
    "hard_link": "import os\nos.link('@secret@', 'link')\nprint('SUCCEEDED' if open('link').read() else '')",
    "dots": "print('SUCCEEDED' if open('../' * 40 + '@secret@').read() else '')",
    "memory_mapping": """
import mmap
with open('@secret@') as file:
    print('SUCCEEDED' if mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[:6] else '')
""",
    "relative_to_a_descriptor": """
import os
folder = os.open('@folder@', os.O_PATH)
print('SUCCEEDED' if os.read(os.open('secret.txt', os.O_RDONLY, dir_fd=folder), 6) else '')
""",
    "subclasses": """
for kind in ().__class__.__base__.__subclasses__():
    if kind.__name__ == '_wrap_close':
        opened = kind.__init__.__globals__['open']('@secret@', 0)
        print('SUCCEEDED' if kind.__init__.__globals__['read'](opened, 6) else '')
""",
    "loaded_modules": """
import sys
posix = sys.modules['posix']
print('SUCCEEDED' if posix.read(posix.open('@secret@', 0), 6) else '')
""",
    "frames": """
import sys
frame = sys._getframe()
while frame is not None:
    for name in ('os', 'posix'):
        module = frame.f_globals.get(name)
        if module is not None:
            print('SUCCEEDED' if module.read(module.open('@secret@', 0), 6) else '')
            raise SystemExit
    frame = frame.f_back
""",
    "import_machinery": """
import importlib.machinery
print('SUCCEEDED' if importlib.machinery.SourceFileLoader('x', '@secret@').get_data('@secret@') else '')
""",
}

WRITING = {
    "open": "open('@folder@/new.txt', 'w').write('x')\nprint('SUCCEEDED')",
    "overwrite": "open('@secret@', 'w').write('x')\nprint('SUCCEEDED')",
    "append": "open('@secret@', 'a').write('x')\nprint('SUCCEEDED')",
    "os_open": "import os\nos.open('@folder@/new.txt', os.O_CREAT | os.O_WRONLY)\nprint('SUCCEEDED')",
    "ctypes_creat": """
import ctypes
if ctypes.CDLL(None).creat(b'@folder@/new.txt', 0o600) >= 0:
    print('SUCCEEDED')
""",
    "rename_out": "import os\nopen('a', 'w')\nos.rename('a', '@folder@/new.txt')\nprint('SUCCEEDED')",
    "rename_in": "import os\nos.rename('@secret@', 'a')\nprint('SUCCEEDED')",
    "link_out": "import os\nopen('a', 'w')\nos.link('a', '@folder@/new.txt')\nprint('SUCCEEDED')",
    "unlink": "import os\nos.unlink('@secret@')\nprint('SUCCEEDED')",
    "make_folder": "import os\nos.mkdir('@folder@/new')\nprint('SUCCEEDED')",
    "truncate": "import os\nos.truncate('@secret@', 0)\nprint('SUCCEEDED')",
    "mode": "import os\nos.chmod('@secret@', 0o777)\nprint('SUCCEEDED')",
    "times": "import os\nos.utime('@secret@', (1, 1))\nprint('SUCCEEDED')",
    "remove_tree": """
import os, shutil
shutil.rmtree('@folder@', ignore_errors=True)
print('SUCCEEDED' if not os.path.exists('@secret@') and os.access('/', os.F_OK) and '@level@' == 'unsafe' else '')
""",
    "through_symbolic_link": """
import os
os.symlink('@folder@', 'link')
open('link/new.txt', 'w').write('x')
print('SUCCEEDED')
""",
    "named_pipe": "import os\nos.mkfifo('@folder@/new')\nprint('SUCCEEDED')",
}

NETWORK = {
    "tcp": "import socket\nsocket.create_connection(('127.0.0.1', @tcp@), timeout=2)\nprint('SUCCEEDED')",
    "udp": """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @udp@))
print('SUCCEEDED')
""",
    "name_lookup": """
import socket
query = b'\\x00\\x01\\x01\\x00\\x00\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x01a\\x04test\\x00\\x00\\x01\\x00\\x01'
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(query, ('127.0.0.1', @udp@))
print('SUCCEEDED')
""",
    "unix": "import socket\nsocket.socket(socket.AF_UNIX).connect('@unix@')\nprint('SUCCEEDED')",
    "abstract_unix": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0@abstract@')\nprint('SUCCEEDED')",
    "datagram_of_a_pair": """
import socket
pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
pair[0].sendto(b'x', '@datagram@')
print('SUCCEEDED')
""",
    "ctypes_socket": """
import ctypes
if ctypes.CDLL(None).socket(2, 1, 0) >= 0:
    print('SUCCEEDED')
""",
    "server": "import socket\nsocket.create_server(('127.0.0.1', 0))\nprint('SUCCEEDED')",
    "http": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:@http@/', timeout=2)\nprint('SUCCEEDED')",
}

PROCESSES = {
    "fork": """
import os
if os.fork() == 0:
    os._exit(0)
print('SUCCEEDED')
""",
    "subprocess": "import subprocess\nsubprocess.run(['/bin/true'], check=True)\nprint('SUCCEEDED')",
    "system": "import os\nprint('SUCCEEDED' if os.system('true') == 0 else '')",
    "popen": "import os\nprint('SUCCEEDED' if os.popen('echo yes').read() else '')",
    "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})\nprint('SUCCEEDED')",
    "exec": "import os\nos.execv('/bin/echo', ['echo', 'SUCCEEDED'])",
    "pty": "import pty\npid, descriptor = pty.fork()\nprint('SUCCEEDED')",
    "multiprocessing": """
import multiprocessing
process = multiprocessing.get_context('fork').Process(target=print)
process.start()
process.join()
print('SUCCEEDED')
""",
    "memory_file": """
import ctypes, os
descriptor = os.memfd_create('x')
os.write(descriptor, open('/bin/echo', 'rb').read())
os.execve(descriptor, ['echo', 'SUCCEEDED'], {})
""",
    "left_behind": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.close(1), os.close(2)
        time.sleep(1)
        os._exit(0)
    os._exit(0)
print('SUCCEEDED')
""",
}

# These programs never run without a sandbox. They print SUCCEEDED where the kernel let them through.
KERNEL = {
    "signal_to_judge": "import os, signal\nos.kill(@judge@, 0)\nprint('SUCCEEDED')",
    "stop_judge": "import os, signal\nos.kill(@judge@, signal.SIGSTOP)\nprint('SUCCEEDED')",
    "signal_to_parent": "import os, signal\nos.kill(os.getppid() or 1 << 20, signal.SIGKILL)\nprint('SUCCEEDED')",
    "signal_to_all": "import os, signal\nos.kill(-1, signal.SIGKILL)\nprint('SUCCEEDED')",
    "signal_to_group": "import os, signal\nos.kill(0, signal.SIGKILL)\nprint('SUCCEEDED')",
    "queued_signal": """
import ctypes, platform
number = {'x86_64': 129, 'aarch64': 138}[platform.machine()]
if ctypes.CDLL(None).syscall(number, @judge@, 0, ctypes.create_string_buffer(128)) == 0:
    print('SUCCEEDED')
""",
    "process_descriptor": "import os\nos.pidfd_open(@judge@)\nprint('SUCCEEDED')",
    "trace": "import ctypes\nif ctypes.CDLL(None).ptrace(16, @judge@, 0, 0) == 0:\n    print('SUCCEEDED')",
    "be_traced": "import ctypes\nif ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0:\n    print('SUCCEEDED')",
    "read_memory": """
import ctypes, platform
number = {'x86_64': 310, 'aarch64': 270}[platform.machine()]
if ctypes.CDLL(None).syscall(number, @judge@, None, 0, None, 0, 0) >= 0:
    print('SUCCEEDED')
""",
    "limits_of_judge": "import resource\nresource.prlimit(@judge@, resource.RLIMIT_NOFILE)\nprint('SUCCEEDED')",
    "raise_limits": """
import resource
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (hard * 2, hard * 2))
print('SUCCEEDED')
""",
    "user_namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0:\n    print('SUCCEEDED')",
    "mount": """
import ctypes
if ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0:
    print('SUCCEEDED')
""",
    "change_root": "import os\nos.chroot('.')\nprint('SUCCEEDED')",
    "other_user": "import os\nos.setuid(0)\nprint('SUCCEEDED')",
    "capabilities": "import ctypes\nif ctypes.CDLL(None).prctl(24, 0, 0, 0, 0) == 0:\n    print('SUCCEEDED')",
    "io_uring": """
import ctypes
if ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(256)) >= 0:
    print('SUCCEEDED')
""",
    "bpf": """
import ctypes, platform
number = {'x86_64': 321, 'aarch64': 280}[platform.machine()]
if ctypes.CDLL(None).syscall(number, 0, ctypes.create_string_buffer(128), 128) >= 0:
    print('SUCCEEDED')
""",
    "keys": """
import ctypes, platform
number = {'x86_64': 250, 'aarch64': 219}[platform.machine()]
if ctypes.CDLL(None).syscall(number, 0, -3, 1) >= 0:
    print('SUCCEEDED')
""",
    "thirty_two_bit_calls": """
import ctypes, platform
if platform.machine() == 'x86_64' and ctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0) >= 0:
    print('SUCCEEDED')
""",
    "file_handles": """
import ctypes, platform
number = {'x86_64': 304, 'aarch64': 265}[platform.machine()]
ctypes.set_errno(0)
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(number, -100, ctypes.create_string_buffer(128), 0) >= 0 or ctypes.get_errno() != 1:
    print('SUCCEEDED')
""",
    # Without a path to follow, the call fails either because it is refused or because of its arguments; the error
    # number tells which.
    "exec_call": """
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
for number in {'x86_64': (59, 322), 'aarch64': (221, 281)}[platform.machine()]:
    libc.syscall(number, None, None, None, None, 0)
    if ctypes.get_errno() != 1:
        print('SUCCEEDED')
""",
    "signals_by_descriptor": """
import fcntl, os, socket
fcntl.fcntl(socket.socketpair()[0], 8, @judge@)
print('SUCCEEDED')
""",
    "signals_by_descriptor_extended": """
import ctypes, socket, struct
pair = socket.socketpair()
owner = ctypes.create_string_buffer(struct.pack('ii', 1, @judge@))
if ctypes.CDLL(None).fcntl(pair[0].fileno(), 15, owner) == 0:
    print('SUCCEEDED')
""",
    "mode_by_descriptor": """
import os, stat
descriptor = os.open(os.__file__, os.O_RDONLY)
os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode))
print('SUCCEEDED')
""",
    "memory_without_a_limit": "import os\nos.memfd_create('x')\nprint('SUCCEEDED')",
    "installed_packages": """
import os
library = os.path.dirname(os.__file__)
for folder in (f'{library}/site-packages', '/usr/lib/python3/dist-packages', '/usr/local/lib/python3/dist-packages'):
    for path, folders, files in os.walk(folder):
        for name in files:
            if open(f'{path}/{name}', 'rb').read(1):
                print('SUCCEEDED')
                raise SystemExit
""",
    "inherited_descriptors": """
import os
found = []
for descriptor in range(3, 64):
    try:
        os.fstat(descriptor)
        found.append(descriptor)
    except OSError:
        pass
print('SUCCEEDED' if found else '')
""",
    "environment": "import os\nprint('SUCCEEDED' if os.environ or os.getenv('HOME') else '')",
}

# These programs must end by a limit: the second value names it, where a test can know which it is.
BOMBS = {
    "fork_bomb": ("import os\nwhile True:\n    os.fork()", None),
    "vfork_bomb": ("import ctypes\nlibc = ctypes.CDLL(None)\nwhile libc.fork() >= 0:\n    pass\nraise OSError", None),
    "thread_bomb": (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
        None,
    ),
    "memory": ("held = []\nwhile True:\n    held.append(bytearray(10_000_000))", "memory"),
    "memory_at_once": ("bytearray(10**12)", "memory"),
    "memory_by_mapping": ("import mmap\nheld = [mmap.mmap(-1, 10**8) for _ in range(10**4)]", None),
    "one_large_file": ("with open('x', 'wb') as file:\n    while True:\n        file.write(bytes(10**6))", "disk"),
    "many_files": ("for i in range(10**6):\n    open(f'{i}', 'wb').write(bytes(10**5))", "disk"),
    "many_small_files": ("for i in range(10**7):\n    open(f'{i}', 'wb').close()", "disk"),
    "small_threads": (
        "import threading, time\nthreading.stack_size(32768)\nheld = []\n"
        "for _ in range(5000):\n    held.append(threading.Thread(target=time.sleep, args=(99,), daemon=True))\n"
        "    held[-1].start()\nprint('STARTED ALL')",
        None,
    ),
    "deep_folders": (
        "import os\nfor _ in range(3000):\n    os.mkdir('a')\n    os.chdir('a')\nwhile True:\n    pass",
        None,
    ),
    "unreadable_folder": (
        "import os\nos.mkdir('a', 0o300)\nfor i in range(10**6):\n    open(f'a/{i}', 'wb').write(bytes(10**6))",
        "disk",
    ),
    "many_descriptors": ("held = [open('x', 'w') for _ in range(10**5)]", None),
    "endless_output": ("while True:\n    print('x' * 1000)", "output"),
    "endless_errors": ("import sys\nwhile True:\n    print('x' * 1000, file=sys.stderr)", "output"),
    "endless_loop": ("while True:\n    pass", "time"),
    "endless_loop_in_c": ("import itertools\nsum(itertools.repeat(1))", "time"),
    "regular_expression": ("import re\nre.match('(a+)+$', 'a' * 64 + 'b')", "time"),
    "huge_power": ("x = 7 ** (10**9)", "time"),
    "sleep": ("import time\ntime.sleep(10**6)", "time"),
    "deaf_to_signals": (
        "import signal\nfor n in range(1, 65):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
        "time",
    ),
    "catches_everything": (
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        "time",
    ),
    "waits_for_input": ("import threading\nthreading.Event().wait()", "time"),
    "endless_at_exit": ("import atexit\n@atexit.register\ndef _():\n    while True:\n        pass", "time"),
    "recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    f()\nf()", None),
    "recursion_in_c": (
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6):\n    x = [x]\nrepr(x)",
        None,
    ),
    "digits_of_a_huge_integer": ("import sys\nsys.set_int_max_str_digits(0)\nstr(1 << 10**8)", "time"),
    "crash": ("import ctypes\nctypes.string_at(0)", None),
    "abort": ("import os\nos.abort()", None),
}

# These programs are asked for add(a, b), do not have it, and try to pass all the same.
TAMPERING = {
    "prints_a_verdict": "print('PASSED')\nprint('{\"value\": \"3\"}')\ndef add(a, b):\n    print('all tests passed')",
    "equal_to_everything": """
class Equal:
    def __eq__(self, other): return True
    def __hash__(self): return 3
def add(a, b): return Equal()
""",
    "integer_equal_to_everything": """
class Equal(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def add(a, b): return Equal(0)
""",
    "list_equal_to_everything": """
class Equal(list):
    def __eq__(self, other): return True
def add(a, b): return Equal([0])
""",
    "leaves_early": "import os\nos._exit(0)",
    "leaves_by_exception": "raise SystemExit(0)",
    "leaves_in_call": "import os\ndef add(a, b): os._exit(0)",
    "at_exit": "import atexit\natexit.register(print, 'PASSED')\ndef add(a, b): raise SystemExit(0)",
    "patches_builtins": """
import builtins
builtins.len = lambda x: 3
builtins.isinstance = lambda a, b: True
builtins.repr = lambda x: '3'
def add(a, b): return 0
""",
    "patches_the_encoder": """
import json, sys
json.dumps = lambda *a, **k: '{"value": "null"}'
for module in list(sys.modules.values()):
    if hasattr(module, '_tagged'):
        module._tagged = lambda value: {'equals': 'everything'}
def add(a, b): return 0
""",
    "writes_answers_itself": """
import os
for descriptor in range(3, 10):
    try:
        os.write(descriptor, b'{"value": "true"}\\n' * 3)
    except OSError:
        pass
def add(a, b): return 0
""",
    "writes_rubbish": """
import os
def add(a, b):
    os.write(4, b'\\x00\\xff{{{{\\n')
    return 0
""",
    "closes_the_channel": "import os\ndef add(a, b):\n    os.close(4)\n    return 0",
    "closes_all": "import os\nos.closerange(0, 64)\ndef add(a, b): return 0",
    "walks_the_frames": """
import sys
def add(a, b):
    frame = sys._getframe()
    while frame is not None:
        for name in list(frame.f_locals):
            if name in ('expected', 'tests', 'answer'):
                return frame.f_locals[name]
        frame = frame.f_back
""",
    "searches_the_heap": """
import gc
def add(a, b):
    for found in gc.get_objects():
        if isinstance(found, dict) and 'expected' in found:
            return found['expected']
""",
    "huge_integer": "def add(a, b): return 10 ** 10_000_000",
    "deep_nesting": "def add(a, b):\n    x = []\n    for _ in range(10**6):\n        x = [x]\n    return x",
    "half_a_surrogate_pair": "def add(a, b): raise ValueError('\\ud800')",
    "many_keys_of_one_hash": "def add(a, b): return {i * (2**61 - 1) for i in range(2000)}",
    "not_a_number": "def add(a, b): return float('nan')",
    "never_answers": "def add(a, b):\n    while True:\n        pass",
}
