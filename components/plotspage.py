"""python -m components.plotspage FILE: write the page of dvc plots with its scripts, so that it needs no network.

DVC's own page loads Vega, Vega-Lite and Vega-Embed from the network.  This one holds them; they come with the package
vl-convert-python.  .dvc/config names the file, and `make install` writes it.
"""

from __future__ import annotations

from pathlib import Path

from components import program
from runtime import manifest

GLOBALS = "window.vega = vega; window.vegaLite = vegaLite; window.vegaEmbed = vegaEmbed;"
PAGE = """<!DOCTYPE html>
<html>
<head>
    <meta charset="utf-8">
    {refresh_tag}
    <title>DVC plots</title>
    <style>
        body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem }
        table { border-spacing: 15px }
    </style>
    <script>SCRIPTS</script>
</head>
<body>
    {plot_divs}
</body>
</html>
"""  # DVC replaces the words in braces


def page() -> str:
    import vl_convert

    return PAGE.replace("SCRIPTS", vl_convert.javascript_bundle(GLOBALS).replace("</script", r"<\/script"))


def main() -> None:
    flags = program.Parser("components.plotspage", __doc__)
    flags.add_argument("file", type=Path, help="where .dvc/config expects it: .dvc/plots/page.html")
    path, text = flags.parse_args().file, page()
    manifest.write_atomically(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    program.run(main)
