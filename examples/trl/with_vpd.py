"""The same with VPD and feedback: short sentences with a given word."""

from datasets import Dataset
from trl import GRPOConfig

from vpd import VPDConfig, VPDTrainer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WORDS = ["apple", "bridge", "candle", "dog", "engine", "forest", "garden", "house", "island", "jacket", "moon", "night"]


def uses_word(completions, word, **kwargs):
    texts = [completion[0]["content"].lower() for completion in completions]
    return [(float(w in text), f"Use the word {w}.") for text, w in zip(texts, word, strict=True)]


rows = [
    {"prompt": [{"role": "user", "content": f"Write one very short sentence with the word {word}."}], "word": word}
    for word in WORDS
]
args = GRPOConfig(
    output_dir="runs/word",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    num_generations=4,
    max_completion_length=32,
    learning_rate=1e-5,
    max_steps=20,
    logging_steps=1,
    bf16=False,
)
args = VPDConfig.from_trl(args)
trainer = VPDTrainer(model=MODEL, reward_funcs=uses_word, args=args, train_dataset=Dataset.from_list(rows))
trainer.train()
