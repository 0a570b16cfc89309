"""Examples:

  jaxlm generate runs/quickstart --prompt "def main("
  jaxlm generate path/to/hf_folder --prompt "Once upon a time" --temperature 0 --max-new-tokens 200
  jaxlm generate runs/quickstart --prompts prompts.jsonl --num-samples 100 --out samples.jsonl

MODEL is a run's folder or a Hugging Face folder (config.json, safetensors, tokenizer). With --prompts, a file with one
JSON object {"prompt": …} or one plain line per prompt is continued at full batch, finished rows being refilled at once,
and each sample is a JSON line: prompt, text, tokens, logprobs and entropies (nats, of the model's own distribution)
and finish_reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.recipes.runtime import Runtime, configure

if TYPE_CHECKING:
    from jaxlm.generate.sample import Generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm generate`."""
    parser.add_argument("model", metavar="MODEL", help="a run's folder (or gs://…), or a Hugging Face folder")
    parser.add_argument("--prompt", help="one prompt; the continuation is streamed to the terminal")
    parser.add_argument("--prompts", metavar="FILE", help="many prompts: jsonl with a field 'prompt', or plain lines")
    parser.add_argument("--out", metavar="FILE", help="with --prompts: where the JSON lines go (default: the terminal)")
    parser.add_argument("--step", type=int, help="a run's checkpoint (default: the newest)")
    parser.add_argument("--tokenizer", help="in place of the folder's own")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--stop", action="append", default=[], help="a string that ends a sample (may be repeated)")
    parser.add_argument("--num-samples", type=int, default=1, help="samples per prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32, help="samples decoded together")


def main(args: argparse.Namespace) -> int:
    """Generates, streaming one prompt or writing many as JSON lines."""
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("give either --prompt TEXT or --prompts FILE")
    configure(Runtime())
    from jaxlm.generate.sample import SamplingConfig, generate
    from jaxlm.recipes.load import load_model

    sampling = SamplingConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        stop=tuple(args.stop),
        num_samples=args.num_samples,
        seed=args.seed,
    )
    model = load_model(args.model, step=args.step, tokenizer=args.tokenizer)
    print(f"model: {model.origin}", file=sys.stderr)
    common: dict[str, Any] = dict(
        cfg=model.cfg, sampling=sampling, tokenizer=model.tokenizer, batch_size=args.batch_size
    )
    if args.prompt is not None:
        streaming = args.num_samples == 1
        if streaming:
            print(args.prompt, end="", flush=True)
        show = (lambda _, text: print(text, end="", flush=True)) if streaming else None
        results = generate(model.params, [args.prompt], **common, chunk=4, on_text=show)
        print() if streaming else print("\n---\n".join(args.prompt + r.text for r in results))
        return 0
    prompts = list(read_prompts(Path(args.prompts)))
    _write_many(args, prompts, lambda on_finish: generate(model.params, prompts, **common, on_finish=on_finish))
    return 0


def read_prompts(path: Path) -> Iterator[str]:
    """The prompts of a file; ValueError naming the line for a JSON row without a text field 'prompt'."""
    if not path.is_file():
        raise ValueError(f"--prompts {path}: no such file")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if path.suffix not in (".jsonl", ".ndjson"):
            yield line
            continue
        row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{path}:{number}: expected {{"prompt": "…"}}, found {line[:80]!r}')
        yield row["prompt"]


def _write_many(args: argparse.Namespace, prompts: list[str], run: Any) -> None:
    from tqdm import tqdm

    with tqdm(total=len(prompts) * args.num_samples, unit="sample", disable=None) as bar:
        results = run(lambda _: bar.update())
    lines = "".join(json.dumps(as_json(r, prompts[r.prompt]), ensure_ascii=False) + "\n" for r in results)
    if args.out is None:
        sys.stdout.write(lines)
    else:
        Path(args.out).write_text(lines)
        print(f"{len(results):,} samples in {args.out}", file=sys.stderr)


def as_json(result: Generation, prompt: str) -> dict[str, Any]:
    """One sample as the JSON line that `jaxlm generate` writes."""
    return {
        "prompt": prompt,
        "sample": result.sample,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "tokens": result.tokens.tolist(),
        "logprobs": [round(float(x), 6) for x in result.logprobs],
        "entropies": [round(float(x), 6) for x in result.entropies],
    }
