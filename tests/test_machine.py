from vpd.machine import peak_memory_bytes


def test_the_peak_is_in_bytes_and_never_falls():
    before = peak_memory_bytes()
    held = bytearray(64 << 20)
    during = peak_memory_bytes()
    assert before > 10 << 20
    assert during >= before
    del held
    assert peak_memory_bytes() >= during
