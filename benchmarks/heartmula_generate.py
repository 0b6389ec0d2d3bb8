"""Our frame loop against a plain one with the structure of the original: keys and values kept for every head that asks and for the
longest song there could be, read whole through a mask; each token fetched from the device. The same random weights, side by side,
greedy, guidance 1.5, one song; the release's depths and heads at a fraction of its width, and the cache's length reduced with the
width, so that weights and cache have the release's proportions.
And our loop against the speed at which this machine's memory gives the weights: on a graphics card in the release's own shape.
Run it with nothing else on the machine:  python benchmarks/heartmula_generate.py  (a few minutes, 4 GB of memory; on a card 40 GB)"""
import argparse
import time
from statistics import median

import torch
from machine import processor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from musiclab.dense import can_int8
from musiclab.heartmula.checkpoint import LONGEST, RELEASE, Config, Stack, random_weights
from musiclab.heartmula.fast import FastModel
from musiclab.heartmula.frames import Writing, write
from musiclab.heartmula.model import llama, of_release
from musiclab.heartmula.prompts import Prompt
from musiclab.sampling import Sampler


def shrunk(factor: int) -> Config:
    "The release with all widths divided."
    def stack(s): return Stack(s.layers, s.heads, s.kv_heads, s.width // factor, s.mlp // factor)
    return Config(stack(RELEASE.backbone), stack(RELEASE.decoder), 1024, 8192 // factor + 5, 8, 64)


class Plain:
    "One stack, layer by layer, with a cache as large as it could ever be needed."
    def __init__(self, weights: dict, part: str, stack: Stack, songs: int, length: int):
        self.weights = {name.removeprefix(part + "."): weight for name, weight in weights.items() if name.startswith(part + ".")}
        self.stack, self.length = stack, length
        frequencies = llama(Stack(1, stack.heads, stack.kv_heads, stack.width, 8)).rotary_emb.inv_freq
        angles = torch.arange(length)[:, None] * frequencies
        self.cos, self.sin, self.seen = angles.cos(), angles.sin(), torch.ones(length, length, dtype=torch.bool).tril()
        shape, like = (songs, stack.heads, length, stack.head_dim), self.weights["norm.scale"]
        self.keys, self.values = ([like.new_zeros(shape) for _ in range(stack.layers)] for _ in range(2))

    def norm(self, x, name):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weights[name]

    def turned(self, x, places):
        pairs = x.float().unflatten(-1, (-1, 2))
        cos, sin = self.cos[places][:, None], self.sin[places][:, None]
        a, b = pairs[..., 0], pairs[..., 1]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)

    def __call__(self, x, places):
        s, w = self.stack, self.weights
        mask = self.seen[places][None, None]
        for n in range(s.layers):
            name = f"layers.{n}."
            h = self.norm(x, name + "sa_norm.scale")
            q, k, v = (F.linear(h, w[f"{name}attn.{which}_proj.weight"]).unflatten(-1, (-1, s.head_dim)) for which in "qkv")
            q, k = self.turned(q, places), self.turned(k, places)
            k, v = (each.unsqueeze(3).expand(-1, -1, -1, s.heads // s.kv_heads, -1).flatten(2, 3).transpose(1, 2) for each in (k, v))
            self.keys[n][:, :, places], self.values[n][:, :, places] = k, v
            heard = F.scaled_dot_product_attention(q.transpose(1, 2), self.keys[n], self.values[n], attn_mask=mask)
            x = x + F.linear(heard.transpose(1, 2).flatten(2), w[f"{name}attn.output_proj.weight"])
            h = self.norm(x, name + "mlp_norm.scale")
            x = x + F.linear(F.silu(F.linear(h, w[f"{name}mlp.w1.weight"])) * F.linear(h, w[f"{name}mlp.w3.weight"]), w[f"{name}mlp.w2.weight"])
        return self.norm(x, "norm.scale")


@torch.inference_mode()
def plain_way(weights: dict, config: Config, prompt: Prompt, frames: int, length: int, guidance: float = 1.5):
    "Tokens, by the plain loop."
    books, vocab = config.codebooks, config.audio_vocab
    backbone, decoder = Plain(weights, "backbone", config.backbone, 2, length), Plain(weights, "decoder", config.decoder, 2, books)
    text, audio = weights["text_embeddings.weight"], weights["audio_embeddings.weight"]
    told = text[torch.from_numpy(prompt.ids)].clone()
    told[prompt.slot] = weights["muq_linear.bias"]
    x = torch.stack([told, weights["unconditional_text_embedding.weight"].expand_as(told)])
    place, song = torch.arange(len(told)), []

    def choose(logits):
        yes, no = logits.float()
        return torch.tensor([(no + guidance * (yes - no)).argmax().item()] * 2) # one look at the result per token

    for _ in range(frames):
        thought = backbone(x, place)[:, -1]
        frame = [choose(F.linear(thought, weights["codebook0_head.weight"]))]
        for cache in (*decoder.keys, *decoder.values): cache.zero_()
        rows = torch.stack([thought, audio[frame[0]]], 1)
        for k in range(1, books):
            at = torch.arange(2) if k == 1 else torch.tensor([k])
            last = decoder(F.linear(rows, weights["projection.weight"]), at)[:, -1]
            frame.append(choose(last @ weights["audio_head"][k - 1]))
            rows = audio[frame[k] + k * vocab][:, None]
        song.append([token[0].item() for token in frame])
        each = [audio[token + k * vocab] for k, token in enumerate(frame)]
        x, place = torch.stack(each, 1).sum(1)[:, None], place[-1:] + 1
    return torch.tensor(song)


class Counter(TorchDispatchMode):
    "Counts operators that compute something (views only look at memory in another way)."
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        schema = function._schema
        aliases = [returned.alias_info for returned in schema.returns]
        self.count += not any(aliases) or any(alias is not None and alias.is_write for alias in aliases)
        return function(*args, **(kwargs or {}))


def operators(way) -> float:
    "Operators per frame."
    with Counter() as few: way(2)
    with Counter() as more: way(4)
    return (more.count - few.count) / 2


def race(ways: dict, frames: int, rounds: int) -> dict[str, float]: # ms per frame
    "All ways in turn, several times. What a prompt costs is taken off: the difference of a long and a short song."
    for way in ways.values(): way(2)
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way(2)
            middle = time.perf_counter()
            way(frames + 2)
            times[name].append(1000 * (time.perf_counter() - middle - (middle - begin)) / frames)
    return {name: median(each) for name, each in times.items()}


def our_way(lm, prompt: Prompt, temperature: float = 0, **how):
    "Frames -> tokens, by our loop."
    fast = FastModel(lm, **how)
    return lambda n: write(Writing(fast, [prompt], n, Sampler([0], temperature, top_k=50), end=lm.config.audio_vocab))[0]


def bandwidth(device: str) -> float: # bytes per second
    "How fast memory is read and written, by copying a gigabyte."
    source = torch.ones(2**28, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(6):
        begin = time.perf_counter()
        target.copy_(source)
        if device == "cuda": torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * 4 * 2**28 / min(times)


def against_memory(factor: int, device: str, frames: int, rounds: int) -> None:
    "Our loop, and the time in which its weights could be read once: the backbone for each frame, the local decoder for each codebook but the first."
    config, prompt = shrunk(factor), Prompt(torch.randint(1, 1000, (60,)).numpy(), 20)
    torch.manual_seed(0)
    with torch.device(device): weights = {name: weight.bfloat16() for name, weight in random_weights(config).items()}
    times = {"backbone.": 1, "decoder.": config.codebooks - 1, "projection.": 1, "codebook0_head.": 1, "audio_head": 1}
    read = sum(count * weight.numel() for name, weight in weights.items() for part, count in times.items() if name.startswith(part))
    lm, limit = of_release(weights, config), bandwidth(device)
    where = torch.cuda.get_device_name() if device == "cuda" else processor()
    print(f"\nwidth {config.backbone.width}, guidance 1.5, top k 50, one song, on {where}, which copies {limit / 1e9:.0f} GB/s")
    for name, size, how in (("bfloat16", 2, {}), ("int8", 1, {"int8": True})):
        if how and not can_int8(torch.device(device)): continue
        ms = race({name: our_way(lm, prompt, temperature=1.0, **how)}, frames, rounds)[name]
        share = size * read / limit * 1000 / ms
        print(f"  {name:9} {ms:8.2f} ms per frame {1000 / ms:7.2f} frames/s {80 / ms:6.2f} x real time, reads {size * read / 1e9:.2f} GB per frame: "
              f"{share:.0%} of the memory's speed" + (f" (goal 50%: {'reached' if share >= 0.5 else 'MISSED'})" if device == "cuda" and not how else ""))


def main(factor: int, length: int, frames: int, rounds: int) -> None:
    config = shrunk(factor)
    torch.manual_seed(0)
    weights = random_weights(config)
    lm = of_release(weights, config)
    prompt = Prompt(torch.randint(1, 1000, (60,)).numpy(), 20)

    ways = {"as the original": lambda n: plain_way(weights, config, prompt, n, length), "musiclab, float32": our_way(lm, prompt)}
    size = sum(weight.numel() for weight in weights.values())
    print(f"\n28 + 3 layers of width {config.backbone.width}, {size / 1e6:.0f} M weights, a cache of {length} rows in the plain loop")
    print(f"  greedy tokens equal: {torch.equal(ways['as the original'](frames), ways['musiclab, float32'](frames))}")
    counts = {name: operators(way) for name, way in ways.items()}
    half = {name: weight.bfloat16() for name, weight in weights.items()}
    ways |= {"as the original, bf16": lambda n: plain_way(half, config, prompt, n, length), "musiclab, bfloat16": our_way(lm, prompt, dtype=torch.bfloat16),
             "musiclab, int8": our_way(lm, prompt, int8=True)}
    same = (ways["as the original, bf16"](frames) == ways["musiclab, bfloat16"](frames)).all(1)
    print(f"  in bfloat16 the first {int(same.cumprod(0).sum())} of {frames} frames are equal: random weights have near ties, which rounding decides")
    times = race(ways, frames, rounds)
    for name, ms in times.items():
        print(f"  {name:22} {ms:8.1f} ms per frame {1000 / ms:7.2f} frames/s" + (f" {counts[name]:7.0f} operators per frame" if name in counts else ""))
    for ours, theirs in (("musiclab, float32", "as the original"), ("musiclab, bfloat16", "as the original, bf16")):
        ratio = times[theirs] / times[ours]
        print(f"  {ours} is {ratio:.2f} times as fast as the plain loop in the same numbers (goal 3): {'reached' if ratio >= 3 else 'MISSED'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=int, nargs="+", default=[4], help="divide the release's widths by this: 32, 16, 8 or 4")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--length", type=int, help="rows of the plain loop's cache; by default 8192 divided by the factor, the original's has 8192")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    card = torch.cuda.is_available()
    against_memory(1 if card else max(options.factor[0], 2), "cuda" if card else "cpu", 200 if card else options.frames, options.rounds)
    for factor in options.factor: main(factor, options.length or LONGEST // factor, options.frames, options.rounds)
