"""Train kvexport's demo model: a small multi-head llama that tells children's stories.

Trains a byte-level BPE tokenizer and Hugging Face's ``LlamaForCausalLM`` from scratch on a CPU in under an
hour, and writes a checkpoint that ``transformers`` loads.

    python examples/train_demo_model.py --text stories.txt more.txt \\
        --heldout heldout.txt --output models/demo --minutes 40

A text file has stories separated by ``<|endoftext|>`` lines or, without these, by a paragraph that opens like
a story. Stories that the edge of a file cuts, that occur twice or that share a paragraph with the held-out
file are dropped. One in twenty-five stories is set aside to choose the checkpoint. The held-out file is read
only for the overlap check and for the final loss.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

END = "<|endoftext|>"
VOCABULARY = 2048
SHAPE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 8}
LONGEST = 1024  # the last window length, and what the checkpoint declares
WINDOWS = ((0.0, 256), (0.7, 512), (0.94, LONGEST))  # (from this share of training, window length)
TOKENS_PER_STEP = 2048
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, DROPOUT = 3e-3, 150, 0.1, 0.05

console = Console(stderr=True, highlight=False)

# UTF-8 read as Windows-1252 ("â€œ"), then typographic marks: all become ASCII, which a small
# vocabulary spells in one token.
MOJIBAKE = {"â€œ": '"', "â€™": "'", "â€˜": "'", "â€“": "-", "â€”": "-", "â€¦": "...", "â€": '"'}
MARKS = {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\u00a0": " "}
# How a story opens where nothing parts it from the one before.
NAME = r"(?!The|She|He|It|We|This|That|There|Mom|Dad|Mum|But)[A-Z][a-z]+"
OPENING = re.compile(
    rf"""\n\n(?=
      Once\ upon\ a\ time | Once\ there | There\ once\ was
    | One\ (?:\w+\ )?day,?\ an?\ [^.]{{0,40}}\ (?:named|called)\b
    | {NAME}(?:\ and\ (?:{NAME}|(?:his|her)\ \w+))?\ (?:
        (?:likes?|liked|loves?|loved)\ (?:to|playing|his|her|their)\b
      | (?:is|was)\ (?:an?|sick|bored|playing)\b
      | (?:are|were)\ (?:(?:\w+\ )?friends|twins|brothers?|sisters?|siblings|playing|in\ the)\b
      | had\ an?\b ))""",
    re.VERBOSE,
)


# --- text -----------------------------------------------------------------------------------


def read_stories(path: Path) -> list[str]:
    """The whole stories of one file, in ASCII punctuation, paragraphs parted by a blank line."""
    text = path.read_text(encoding="utf-8")
    for old, new in (MOJIBAKE | MARKS).items():
        text = text.replace(old, new)
    text = re.sub(r" *\n\s*", "\n\n", text)
    pieces = text.split(END) if END in text else OPENING.split(text)
    stories = [piece.strip() for piece in pieces]
    return [s for s in stories if re.match(r'["A-Z]', s) and s[-1] in '.!?"']


def training_stories(paths: list[Path], heldout: Path | None, seed: int) -> list[str]:
    """Stories of all files, shuffled, each once, none that shares a long paragraph with `heldout`."""
    stories = list(dict.fromkeys(s for path in paths for s in read_stories(path)))
    if heldout is not None:
        unseen = {p for s in read_stories(heldout) for p in s.split("\n\n") if len(p) >= 60}
        kept = [s for s in stories if unseen.isdisjoint(s.split("\n\n"))]
        console.print(f"{len(stories)} stories, {len(stories) - len(kept)} overlap the held-out text")
        stories = kept
    random.Random(seed).shuffle(stories)
    return stories


def train_tokenizer(stories: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose only special token, id 0, begins and ends a story."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(stories, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, model_max_length=LONGEST
    )


def pack(stories: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All stories as one row of token ids, each after the separator, one more at the end."""
    separator = tokenizer.bos_token_id
    rows = tokenizer.backend_tokenizer.encode_batch(stories)
    return torch.tensor([i for row in rows for i in (separator, *row.ids)] + [separator])


# --- model ----------------------------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A llama with as many key/value heads as heads, and dropout where the blocks write."""
    heads = SHAPE["num_attention_heads"]
    config = LlamaConfig(
        **SHAPE,
        vocab_size=VOCABULARY,
        num_key_value_heads=heads,
        head_dim=SHAPE["hidden_size"] // heads,
        max_position_embeddings=LONGEST,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for block in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.normal_(block.weight, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
            block.register_forward_hook(lambda m, _, out: F.dropout(out, DROPOUT, m.training))
    return model


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of every token of each window but its first."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, ids: torch.Tensor, length: int = 512) -> float:
    """Mean cross-entropy per token over adjoining windows of `length` (the short rest is left)."""
    model.eval()
    windows = ids[: (len(ids) - 1) // length * length + 1].unfold(0, length + 1, length)
    total = sum(loss_of(model, chunk, "sum").item() for chunk in windows.split(4))
    model.train()
    return total / (len(windows) * length)


def random_windows(ids: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """As many windows at random places as make one step's tokens."""
    count = TOKENS_PER_STEP // length
    starts = torch.randint(len(ids) - length, (count,), generator=generator)
    return torch.stack([ids[s : s + length + 1] for s in starts.tolist()])


# --- training -------------------------------------------------------------------------------


def train(
    model: LlamaForCausalLM, ids: torch.Tensor, choosing: torch.Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Train in place, leave the best checkpoint by `choosing` in `model`, return what was done."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    best, best_state, step, seen, start = math.inf, {}, 0, 0, time.monotonic()

    def share_done() -> float:
        """How far training is, by whichever of --steps and --minutes is further."""
        by_time = (time.monotonic() - start) / (60 * args.minutes) if args.minutes else 0.0
        return max(step / args.steps if args.steps else 0.0, by_time)

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=1000)
        model.train()
        while (done := min(share_done(), 1.0)) < 1.0:
            rate = LEARNING_RATE * min(1, (step + 1) / WARMUP_STEPS)
            rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            length = [length for share, length in WINDOWS if done >= share][-1]
            loss = loss_of(model, random_windows(ids, length, generator))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, seen = step + 1, seen + TOKENS_PER_STEP
            progress.update(bar, completed=int(1000 * done), description=f"loss {loss.item():.3f}")
            if step % 250 == 0 or share_done() >= 1.0:
                chosen_by = evaluate(model, choosing)
                minutes = (time.monotonic() - start) / 60
                console.print(
                    f"{minutes:5.1f} min  step {step:5d}  {seen / 1e6:5.2f} M tokens  window {length:4d}"
                    f"  loss {loss.item():.3f}  choosing {chosen_by:.3f}"
                )
                if chosen_by < best:
                    best, best_state = chosen_by, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_state)
    minutes = (time.monotonic() - start) / 60
    return {"steps": step, "tokens": seen, "minutes": round(minutes, 1), "choosing": round(best, 4)}


def tell(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str = "Once upon a time", **how: Any
) -> str:
    """One story that begins with `prompt`."""
    inputs = tokenizer(END + prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=300, pad_token_id=tokenizer.eos_token_id, **how)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="story files to train on")
    parser.add_argument("--heldout", type=Path, help="story file that is not trained on, for the final loss")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, help=f"steps of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--minutes", type=float, help="training time; with --steps, the maximum")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if not (args.steps or args.minutes):
        parser.error("give --steps, --minutes or both")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()

    stories = training_stories(args.text, args.heldout, args.seed)
    tokenizer = train_tokenizer(stories)
    aside = max(1, len(stories) // 25)
    choosing, ids = pack(stories[:aside], tokenizer), pack(stories[aside:], tokenizer)
    model = build_model(tokenizer)
    console.print(
        f"{len(stories) - aside} stories of {len(ids)} tokens, {aside} of {len(choosing)} to choose by; "
        f"{model.num_parameters()} parameters"
    )
    report = train(model, ids, choosing, args)
    model = model.to(torch.float16).float().eval()  # judge what is written
    if args.heldout is not None:
        unseen = pack(read_stories(args.heldout), tokenizer)
        report |= {
            f"heldout_{length}": round(evaluate(model, unseen, length), 4) for length in (256, 512, 1024)
        }
        model.eval()
    console.print(report)
    print(tell(model, tokenizer, do_sample=False), end="\n\n")
    print(tell(model, tokenizer, do_sample=True, temperature=0.7, top_k=0))
    model.to(torch.float16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    console.print(f"wrote {sum(f.stat().st_size for f in args.output.iterdir()):,} bytes to {args.output}")


if __name__ == "__main__":
    main()
