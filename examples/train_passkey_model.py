"""Train a small llama that retrieves a pass key or a sentence from hundreds of tokens back.

Trains a byte-level BPE tokenizer and Hugging Face's ``LlamaForCausalLM`` from scratch on one CPU core, on the
texts of `benchmarks/eviction_tasks.py`, and writes a checkpoint that ``transformers`` loads. It stops when
the model, with every token in its cache, retrieves 99 % of what is hidden in held-out prompts, and fails if
--steps are not enough.

    python examples/train_passkey_model.py --output models/passkey

Windows grow from stage to stage as the model learns to answer. Every window asks for all that is hidden in
it; the loss is that of all tokens plus that of the answers. Two things speed it up: half of the windows
repeat random tokens, which gives the most answers, and three heads of the first layer start by attending one,
two and three tokens back.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from eviction_tasks import ASKED, SENTENCE, TASKS, best_thing, haystack, hide, prompts_of
from tasks import BEFORE, NEEDLE, QUESTION, Encode, score, split

END = "<|endoftext|>"
TOLD, KEYED = (SENTENCE, ASKED), (BEFORE, NEEDLE, QUESTION)
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
VOCABULARY, LONGEST = 1024, 1024
ROPE_THETA = 500_000.0  # at 10 000 few of the 32 numbers of a key say at 500 tokens what they say at 5
STAGES = (96, 192, 384, 640)  # tokens in a window
TOKENS_PER_STEP, LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 1920, 3e-3, 100, 0.05
LOOK_BACK, LOOK_PAIRS, LOOK = (1, 2, 3), 6, 2.4  # tokens, rotary pairs that say so, and the weight of each
ENOUGH, READY = (
    0.99,
    0.95,
)  # of held-out answers to stop; of a step's answer tokens, on average, to go to the next stage
CHECKED, TRIALS, DEPTHS = (
    512,
    20,
    (0.0, 0.25, 0.5, 0.75, 1.0),
)  # held-out prompts: tokens, for each depth of each task

console = Console(stderr=True, highlight=False)


# --- text -----------------------------------------------------------------------------------


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, digits in pairs; its only special token, id 0, begins every window."""
    chance = random.Random(seed)
    numbers = " ".join(map(str, range(100))) + " ".join(f"{number:02}" for number in range(100))
    things = [
        form.format(place=place, what=what)
        for place, what in (best_thing(chance) for _ in range(4000))
        for form in TOLD
    ]
    bpe = Tokenizer(models.BPE())
    pairs = pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pairs, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(
        [
            haystack("repeated", 20_000, 0),
            haystack("varied", 100_000, seed),
            *things,
            *[numbers, *KEYED] * 500,
        ],
        trainer,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, model_max_length=LONGEST
    )


class Windows:
    """Training windows: text, what is hidden in it, and a question for each of that."""

    def __init__(self, encode: Encode, vocabulary: int, seed: int) -> None:
        self.encode, self.vocabulary, self.chance = encode, vocabulary, random.Random(seed)
        self.hay = {kind: encode(haystack(kind, 400_000, seed + 1)) for kind in ("repeated", "varied")}

    def window(self, length: int) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them are answers."""
        chance = self.chance
        kind, hidden_things = (
            chance.choice(("repeated", "varied", "varied")),
            chance.choice(("key", "place", "both")),
        )
        needles, questions = [], []
        if hidden_things != "place":
            key = str(chance.randrange(10_000, 100_000))
            needles.append(NEEDLE.format(key=key))
            questions.append((QUESTION, f" {key}"))
        if hidden_things != "key":
            place, what = best_thing(chance)
            needles.append(SENTENCE.format(place=place, what=what))
            questions.append((ASKED.format(place=place), f" {what}"))
        chance.shuffle(questions)
        before = [0, *(self.encode(BEFORE) if hidden_things != "place" and chance.random() < 0.7 else [])]
        asked = [part for question in questions for part in split(self.encode, *question)]
        hidden = [(chance.random(), self.encode(each)) for each in needles]
        room = max(0, length - len(before) - sum(map(len, asked)) - sum(len(each) for _, each in hidden))
        at = chance.randrange(len(self.hay[kind]) - room)
        ids = before + hide(self.hay[kind][at : at + room], hidden)
        answers = [False] * len(ids)
        for which, part in enumerate(asked):
            ids += part
            answers += [which % 2 == 1] * len(part)
        return ids[:length], answers[:length]

    def echo(self, length: int) -> tuple[list[int], list[bool]]:
        """A few random tokens in an order that is repeated; each is an answer but for the first time."""
        period = self.chance.randint(8, 48)
        few = self.chance.sample(range(1, self.vocabulary), self.chance.randint(8, 48))
        ids = self.chance.choices(few, k=period)
        return (ids * length)[:length], [at > period for at in range(length)]

    def batch(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As many windows as make one step's tokens."""
        count = TOKENS_PER_STEP // length
        echoes = count // 2
        pairs = [self.window(length) for _ in range(count - echoes)] + [
            self.echo(length) for _ in range(echoes)
        ]
        return torch.tensor([ids for ids, _ in pairs]), torch.tensor([answers for _, answers in pairs])


# --- model ----------------------------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A llama with as many key/value heads as heads."""
    config = LlamaConfig(
        **SHAPE,
        vocab_size=len(tokenizer),
        num_key_value_heads=SHAPE["num_attention_heads"],
        max_position_embeddings=LONGEST,
        rms_norm_eps=1e-5,
        rope_theta=ROPE_THETA,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    look_back(model, config)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM, config: LlamaConfig) -> None:
    """Let the first layer's first heads begin by attending one, two, ... tokens back: to learn that takes
    longest.

    A number that all embeddings share becomes a query and a key whose rotations agree at just that distance.
    """
    attention, width = model.model.layers[0].self_attn, config.hidden_size // config.num_attention_heads
    pairs = torch.arange(LOOK_PAIRS)
    frequencies = ROPE_THETA ** (-2 * pairs / width)
    model.model.embed_tokens.weight[:, 0] = 3 * config.initializer_range
    for head, distance in enumerate(LOOK_BACK):
        rows = head * width
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[rows : rows + width] = 0
        attention.q_proj.weight[rows + pairs, 0] = LOOK
        attention.k_proj.weight[rows + pairs, 0] = LOOK * (distance * frequencies).cos()
        attention.k_proj.weight[rows + width // 2 + pairs, 0] = LOOK * (distance * frequencies).sin()


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The loss to train by, and the share of answer tokens of the first half of the windows that are the
    likeliest."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    asked = answers[:, 1:]
    half = slice((len(ids) + 1) // 2)
    right = (logits.argmax(-1) == ids[:, 1:])[half][asked[half]].float().mean()
    return each.mean() + each[asked].mean(), right.item()


@torch.no_grad()
def check(model: LlamaForCausalLM, encode: Encode, seed: int, trials: int = TRIALS) -> dict[str, float]:
    """The share of held-out prompts that greedy decoding answers right, by task."""
    model.eval()

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, use_cache=False).logits

    found = {}
    for task in TASKS:
        prompts = prompts_of(encode, task, CHECKED, DEPTHS, trials, seed, start=(0,)).prompts
        found[task] = sum(each.greedy for each in score(logits, prompts)) / len(prompts)
    model.train()
    return found


# --- training -------------------------------------------------------------------------------


def train(
    model: LlamaForCausalLM, windows: Windows, check_now: Callable[[], dict[str, float]], steps: int
) -> bool:
    """Train in place until `check_now` says enough; whether it did."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    stage, lately, last, start = 0, 0.0, -1000, time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=steps)
        model.train()
        for step in range(steps):
            rate = (
                LEARNING_RATE
                * min(1, (step + 1) / WARMUP_STEPS)
                * (0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2)
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, right = loss_of(model, *windows.batch(STAGES[stage]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            lately += (right - lately) / 20
            status = f"window {STAGES[stage]:3d}  loss {loss.item():.3f}  answers {lately:.3f}"
            progress.update(bar, advance=1, description=status)
            if step % 100 == 0:
                console.print(f"{(time.monotonic() - start) / 60:5.1f} min  step {step:5d}  {status}")
            if lately < READY:
                continue
            if stage + 1 < len(STAGES):
                stage, lately = stage + 1, 0.0
            elif step - last >= 50 and lately > ENOUGH:
                found, last = check_now(), step
                console.print(
                    f"step {step}: " + ", ".join(f"{name} {share:.1%}" for name, share in found.items())
                )
                if min(found.values()) >= ENOUGH:
                    return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument(
        "--steps", type=int, default=4000, help=f"maximum number of steps of {TOKENS_PER_STEP} tokens"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()

    tokenizer = train_tokenizer(args.seed)

    def encode(text: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    model = build_model(tokenizer)
    console.print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens")
    enough = train(
        model,
        Windows(encode, len(tokenizer), args.seed),
        lambda: check(model, encode, seed=args.seed + 1000),
        args.steps,
    )
    model = model.to(torch.float16).float()  # judge what is written
    found = check(model, encode, seed=args.seed + 2000, trials=2 * TRIALS)
    for task, share in found.items():
        print(f"{task}: {share:.1%} of {2 * TRIALS * len(DEPTHS)} prompts of {CHECKED} tokens")
    if not enough or min(found.values()) < ENOUGH:
        console.print(f"the model retrieves less than {ENOUGH:.0%}: raise --steps")
        sys.exit(1)
    model.to(torch.float16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    console.print(f"wrote {sum(f.stat().st_size for f in args.output.iterdir()):,} bytes to {args.output}")


if __name__ == "__main__":
    main()
