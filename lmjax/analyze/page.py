"""The frame of this room's pages: self-contained HTML in the look of `lmjax report`.

A content security policy in the page forbids any script but its own, and any request.
"""

import base64
import hashlib
from collections.abc import Sequence

from lmjax.report.assets import SCRIPT, STYLE
from lmjax.report.charts import escape


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole HTML document. title is text and is escaped; body is HTML; style and script go after the report's."""
    script = SCRIPT + script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def figure(title: str, unit: str, chart: str) -> str:
    """A chart with its caption; all three are HTML."""
    return f"<figure><figcaption>{title} <small>{unit}</small></figcaption>{chart}</figure>"


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, which are escaped; the first row is the heading."""
    head, *rest = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
                   for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)]
    body = "".join(f"<tr>{row}</tr>" for row in rest)
    return f'<div class="card scroll"><table class="numbers"><tr>{head}</tr>{body}</table></div>'
