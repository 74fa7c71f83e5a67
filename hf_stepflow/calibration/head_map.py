"""What a mechanism does on each head alone, as a picture: one cell a head, one column a layer."""

from html import escape

from .heads import Heads

_CELL, _LEFT, _TOP, _WIDTH = 16, 40, 6, 640


def head_map(mechanism: str, heads: Heads) -> str:
    """The SVG picture of the heads that were tried.

    Green cells raise the proxy and red ones lower it, the deeper the more; a ring marks the heads that were chosen
    together.

    Args:
        mechanism: its name.
        heads: what was found.
    """
    layers = sorted({layer for layer, _ in heads.gains})
    rows = max(head for _, head in heads.gains) + 1
    strongest = max(map(abs, heads.gains.values())) or 1.0
    cell = max(4.0, min(float(_CELL), (_WIDTH - _LEFT) / len(layers)))
    height = _TOP + rows * cell
    # Wide enough for the words below.
    size = (max(_LEFT + len(layers) * cell, 240.0), height + 34)
    parts = [
        f'<svg class="map" viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" width="{size[0]:.0f}" role="img" '
        f'aria-label="{escape(mechanism)}: proxy by layer and head">'
    ]
    for (layer, head), gain in sorted(heads.gains.items()):
        x, y = _LEFT + layers.index(layer) * cell, _TOP + head * cell
        place = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell - 2:.1f}" height="{cell - 2:.1f}"'
        kind = "raises" if gain > 0 else "lowers"
        chosen = (layer, head) in heads.chosen
        title = f"layer {layer}, head {head}: {gain:+.3f} nats{', chosen' * chosen}"
        parts.append(
            f'<rect class="{kind}" {place} fill-opacity="{abs(gain) / strongest:.2f}"><title>{title}</title></rect>'
        )
        if chosen:
            parts.append(f'<rect class="chosen" {place}/>')
    every, each = -(-len(layers) // 16), -(-rows // 8)
    for at in range(0, len(layers), every):
        x = _LEFT + (at + 0.5) * cell
        parts.append(f'<text class="small" x="{x:.1f}" y="{height + 14:.1f}" text-anchor="middle">{layers[at]}</text>')
    for head in range(0, rows, each):
        y = _TOP + (head + 0.5) * cell + 4
        parts.append(f'<text class="small" x="{_LEFT - 8}" y="{y:.1f}" text-anchor="end">{head}</text>')
    parts.append(f'<text class="small soft" x="{_LEFT}" y="{height + 29:.1f}">layer; rows are its query heads</text>')
    return "".join(parts) + "</svg>"
