"""An inspection as one HTML page that needs nothing else."""

from html import escape

from sparse_gpt.evaluate.inspect import Block, Context, Inspection, Layer

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4a90d9; --mark: #f5c54288; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.note { opacity: .75; } code, .t { font-family: ui-monospace, monospace; white-space: pre-wrap; }
.t { border: 1px solid var(--line); border-radius: 4px; padding: 0 .25em; margin: 0 .15em .15em 0;
  display: inline-block; } .t small { opacity: .6; margin-left: .35em; }
table { border-collapse: collapse; width: 100%; } td, th { border-top: 1px solid var(--line);
  padding: .3rem .5rem; text-align: left; vertical-align: top; } th { position: sticky; top: 0;
  background: Canvas; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
mark { background: var(--mark); color: inherit; } details p { margin: .25rem 0; }
svg { display: block; margin: .4rem 0; } rect { fill: var(--bar); } #find { font: inherit;
  padding: .3rem .5rem; width: 22rem; } .hidden { display: none; }
"""
_SCRIPT = """
const find = document.getElementById("find");
find.addEventListener("input", () => {
  const wanted = find.value.toLowerCase();
  for (const row of document.querySelectorAll("tr[data-text]"))
    row.classList.toggle("hidden", wanted !== "" && !row.dataset.text.includes(wanted));
});
"""


def page(found: Inspection) -> str:
    """The whole page."""
    title = escape(f"{found.checkpoint}: what its blocks do")
    return "\n".join(
        [
            "<!doctype html><html lang='en'><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width'>",
            f"<title>{title}</title><style>{_STYLE}</style>",
            f"<h1>{title}</h1>",
            f"<p class='note'>{found.tokens:,} held-out tokens of {escape(found.data)}. Tokens: "
            "those at which a block is computed, most telling first, with their share of its uses. "
            "Writes: ids whose logits its mean contribution raises over the layer's other blocks, "
            "read straight through the head. Contexts: its largest energies.</p>",
            "<input id='find' type='search' placeholder='blocks with this token or number…'>",
            *(_layer(layer) for layer in found.layers),
            f"<script>{_SCRIPT}</script></html>\n",
        ]
    )


def _layer(layer: Layer) -> str:
    parts = ", ".join(f"{name} {size:.2f}" for name, size in layer.parts.items())
    entropy = "" if layer.entropy is None else f"; entropy of the energies {layer.entropy:.2f} nats"
    head = (
        f"<h2 id='layer-{layer.number}'>Layer {layer.number}</h2><p class='note'>The branch has "
        f"{layer.branch:.2f} of the residual stream's RMS; of the branch's: {parts}{entropy}.</p>"
    )
    if not layer.blocks:
        return head
    rows = "".join(_row(layer, block) for block in layer.blocks)
    return (
        f"{head}{_loads(layer)}<table><thead><tr><th>block<th>load<th>energy<th>tokens<th>writes"
        f"<th>with<th>contexts</tr></thead><tbody>{rows}</tbody></table>"
    )


def _loads(layer: Layer) -> str:
    """Bars of the blocks' loads; 1 is the mean."""
    most = max(block.load for block in layer.blocks)
    bars = "".join(
        f"<rect x='{12 * n}' y='{60 - 60 * block.load / most:.1f}' width='10' "
        f"height='{60 * block.load / most:.1f}'><title>block {block.number}: {block.load:.2f}"
        "</title></rect>"
        for n, block in enumerate(layer.blocks)
    )
    return f"<svg width='{12 * len(layer.blocks)}' height='60' role='img'>{bars}</svg>"


def _row(layer: Layer, block: Block) -> str:
    tokens = "".join(
        f"<span class='t' title='{lift:.1f} times its own frequency'>{_visible(text)}"
        f"<small>{share:.0%}</small></span>"
        for text, share, lift in block.tokens
    )
    writes = "".join(
        f"<span class='t'>{_visible(text)}<small>+{value:.2f}</small></span>"
        for text, value in block.writes
    )
    near = ", ".join(f"{other} <small>×{times:.1f}</small>" for other, times in block.together[:4])
    contexts = "".join(_context(context) for context in block.contexts)
    words = [str(block.number), *(t for t, *_ in block.tokens), *(t for t, _ in block.writes)]
    return (
        f"<tr id='layer-{layer.number}-block-{block.number}' "
        f"data-text='{escape(' '.join(words).lower(), quote=True)}'>"
        f"<td class='n'>{block.number}<td class='n'>{block.load:.2f}"
        f"<td class='n'>{block.energy:.2f}<td>{tokens}<td>{writes}<td>{near}<td><details>"
        f"<summary>{len(block.contexts)}</summary>{contexts}</details></tr>"
    )


def _context(context: Context) -> str:
    return (
        f"<p><code>{escape(context.before)}<mark>{_visible(context.token)}</mark>"
        f"{escape(context.after)}</code> <small>{context.energy:.2f}</small></p>"
    )


def _visible(text: str) -> str:
    """White space that is all of a token, or opens it, shown."""
    return escape(text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣"))
