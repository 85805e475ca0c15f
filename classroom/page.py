"""Pages for the browser, each one self-contained HTML file that needs no network.

    python -m classroom.page              classroom/page.html: the annotated chapters, prose beside
                                          code, equations, symbols, findings with their figures
    python -m classroom.page tutorial     classroom/tutorial.ipynb, and classroom/tutorial.html with
                                          the pictures (runs the tutorial: about two minutes)

The prose is that of the chapters: the docstring of a module, class or function stands beside its
code. The equations are in equations.py. markdown-it renders prose, pygments colours code, and
latex2mathml makes MathML, which browsers display without a script.
"""

import ast
import base64
import html
import re
import sys
import textwrap

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from classroom.equations import EQUATIONS, SYMBOLS
from classroom.handout import ROOT, first_line

CHAPTERS = ["compress.py", "sam.py", "synth.py", "fl.py", "run.py"]
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")

STYLE = """
:root { color-scheme: light; --ink: #1c1c1c; --soft: #59595f; --line: #d9d9de; --blue: #0b5394; }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.5rem; }
body { margin: 0; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
a { color: var(--blue); }
a:focus-visible, pre:focus-visible { outline: 3px solid #d55e00; outline-offset: 2px; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: 1rem; background: #fff; z-index: 3; }
nav { position: sticky; top: 0; z-index: 2; background: #fff; border-bottom: 1px solid var(--line);
      padding: .5rem 1rem; display: flex; gap: .3rem 1.1rem; overflow-x: auto;
      white-space: nowrap; }
main { max-width: 1500px; margin: 0 auto; padding: 0 1rem 4rem; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 2px solid var(--ink); }
h3 { font-size: 1.05rem; margin: .2rem 0 .4rem; } h4 { margin: 1.4rem 0 .3rem; }
.row { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); gap: 0 1.6rem;
       border-top: 1px solid var(--line); padding: .8rem 0; }
.row.member { border-top: 1px dotted var(--line); }
.prose { font-size: .95rem; min-width: 0; } .prose p { margin: .4rem 0; }
.prose, .wide { overflow-wrap: anywhere; }
pre { margin: .3rem 0; overflow-x: auto; background: #f7f7f9; padding: .6rem .8rem;
      border-radius: 4px; font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; background: #f2f2f5;
       padding: 0 .2em; border-radius: 3px; } pre code { background: none; padding: 0; }
.equation { overflow-x: auto; padding: .5rem .2rem; margin: .3rem 0; border-left: 3px solid #d55e00;
            padding-left: .8rem; }
.equation p { margin: 0; color: var(--soft); font-size: .88rem; }
math { font-size: 1.1em; } math[display=block] { text-align: left; margin: .2rem 0; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .92rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left;
         vertical-align: top; overflow-wrap: normal; }
img { max-width: 100%; height: auto; } .wide { max-width: 62rem; }
.highlight a { color: inherit; text-decoration: underline dotted; text-underline-offset: 3px; }
@media (max-width: 760px) { .row { grid-template-columns: minmax(0, 1fr); }
                            pre { font-size: 12px; } body { font-size: 15px; } }
"""

# --------------------------------------------------------------------------------- small pieces


def mathml(latex, block=False):
    """An equation in LaTeX as MathML."""
    return convert(latex, display="block" if block else "inline")


def equations_of(anchor):
    """The equations that belong to a chapter or function, with a word about each."""
    found = [
        f'<div class="equation" tabindex="0">{mathml(latex, True)}<p>{html.escape(words)}</p></div>'
        for place, latex, words in EQUATIONS
        if place == anchor
    ]
    return "\n".join(found)


def prose(text, anchors=(), chapter=""):
    """Markdown as HTML, in which the names of functions and chapters are links.

    chapter: where names are looked for first.
    """
    rendered = MARKDOWN.render(text)

    def linked(match):
        name = html.unescape(match[1])
        places = (f"{chapter}.{name}", name, name.removesuffix(".py"))
        place = next((place for place in places if place in anchors), None)
        return f'<a href="#{place}"><code>{match[1]}</code></a>' if place else match[0]

    return re.sub(r"<code>([^<\n]+)</code>", linked, rendered)


def code(source, anchors=()):
    """Python as HTML, in which sam.perturb and the like are links."""
    if not source.strip():
        return ""
    coloured = highlight(textwrap.dedent(source).strip("\n"), PythonLexer(), HtmlFormatter())
    coloured = coloured.replace("<pre>", '<pre tabindex="0">')

    def linked(match):
        place = f"{match[2]}.{match[4]}"
        return f'<a href="#{place}">{match[0]}</a>' if place in anchors else match[0]

    name = r'<span class="n">(\w+)</span>'
    pattern = rf'({name})(<span class="o">\.</span>){name}'
    return re.sub(pattern, linked, coloured)


def page(title, links, body):
    """A whole page; links: [(anchor, text)] of the bar at the top."""
    bar = " ".join(f'<a href="#{anchor}">{html.escape(text)}</a>' for anchor, text in links)
    colours = HtmlFormatter(style="sas").get_style_defs(".highlight")
    head = f"<title>{html.escape(title)}</title><style>{STYLE}\n{colours}</style>"
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    icon = '<link rel="icon" href="data:,">'
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{view}{icon}{head}</head>'
        f'<body><a class="skip" href="#main">to the text</a><nav aria-label="chapters">{bar}</nav>'
        f'<main id="main"><h1>{html.escape(title)}</h1>\n{body}\n</main></body></html>\n'
    )


# ----------------------------------------------------------------------------------- the chapters


def definitions(tree):
    """The functions and classes of a body."""
    return [x for x in tree.body if isinstance(x, ast.FunctionDef | ast.ClassDef)]


def all_anchors():
    """Where a link can lead: chapters, their functions, classes and methods."""
    found = set()
    for file in CHAPTERS:
        name, tree = file.removesuffix(".py"), ast.parse((ROOT / file).read_text())
        found.add(name)
        for node in definitions(tree):
            found |= {f"{name}.{node.name}"}
            if isinstance(node, ast.ClassDef):
                found |= {f"{name}.{node.name}.{method.name}" for method in definitions(node)}
    return found


class Source:
    """A chapter's text, of which pieces are asked for by line."""

    def __init__(self, file):
        self.name, self.text = file.removesuffix(".py"), (ROOT / file).read_text()
        self.lines, self.tree = self.text.splitlines(), ast.parse(self.text)

    def piece(self, first, last):
        """Lines first to last, counted from 1."""
        return "\n".join(self.lines[first - 1 : last])

    def without_doc(self, node, last):
        """A definition up to a line, without its docstring."""
        first = first_line(node)
        if not ast.get_docstring(node):
            return self.piece(first, last)
        doc = node.body[0]
        return self.piece(first, doc.lineno - 1) + "\n" + self.piece(doc.end_lineno + 1, last)


def row(anchor, title, text, source, anchors, member=False):
    """Prose on the left, code on the right."""
    text = prose(text, anchors, anchor.split(".")[0]) if text else ""
    kind = "row member" if member else "row"
    head = f'<h3 id="{anchor}"><a href="#{anchor}"><code>{html.escape(title)}</code></a></h3>'
    left = f'<div class="prose">{head}{text}{equations_of(anchor)}</div>'
    return f'<section class="{kind}">{left}<div>{code(source, anchors)}</div></section>'


def class_rows(source, node, anchors):
    """A class: first what it declares, then a row for each method."""
    methods, anchor = definitions(node), f"{source.name}.{node.name}"
    last = first_line(methods[0]) - 1 if methods else node.end_lineno
    doc = ast.get_docstring(node) or ""
    rows = [row(anchor, f"class {node.name}", doc, source.without_doc(node, last), anchors)]
    for method in methods:
        doc, text = ast.get_docstring(method) or "", source.without_doc(method, method.end_lineno)
        title = f"{node.name}.{method.name}"
        rows.append(row(f"{anchor}.{method.name}", title, doc, text, anchors, True))
    return rows


def chapter(file, anchors):
    """A chapter as HTML."""
    source = Source(file)
    doc = ast.get_docstring(source.tree)
    title, _, rest = doc.partition("\n")
    rows = [f'<h2 id="{source.name}">{file}</h2>', f'<div class="wide"><p>{html.escape(title)}</p>']
    rows += [prose(rest, anchors, source.name), equations_of(source.name), "</div>"]
    end = source.tree.body[0].end_lineno
    for node in definitions(source.tree):
        rows.append(between(source.piece(end + 1, first_line(node) - 1), anchors))
        end = node.end_lineno
        if isinstance(node, ast.ClassDef):
            rows += class_rows(source, node, anchors)
        else:
            text, anchor = source.without_doc(node, end), f"{source.name}.{node.name}"
            rows.append(row(anchor, node.name, ast.get_docstring(node) or "", text, anchors))
    rows.append(between(source.piece(end + 1, len(source.lines)), anchors))
    return "\n".join(rows)


def between(text, anchors):
    """What stands between two definitions: headings of sections, comments, constants, imports."""
    heads = [f"<h4>{html.escape(head)}</h4>" for head in re.findall(r"(?m)^# -{5,} (.*)$", text)]
    rest = re.sub(r"(?m)^# -{5,} .*$", "", text).strip()
    if rest:
        heads.append(f'<section class="row"><div></div><div>{code(rest, anchors)}</div></section>')
    return "\n".join(heads)


# ------------------------------------------------------------------------------ symbols, findings


def symbols():
    """The table of symbols."""
    rows = [
        f"<tr><td>{mathml(latex)}</td><td><code>{html.escape(name)}</code></td>"
        f"<td>{html.escape(shape)}</td><td>{html.escape(meaning)}</td></tr>"
        for latex, name, shape, meaning in SYMBOLS
    ]
    head = "<tr><th>symbol</th><th>in code</th><th>shape</th><th>meaning</th></tr>"
    return f'<h2 id="symbols">Symbols</h2><table>{head}{"".join(rows)}</table>'


def inlined(path):
    """An image as the address of itself."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def findings():
    """results/README.md with its figures, its headings and links inside this page."""
    path = ROOT / "results" / "README.md"
    text = path.read_text().removeprefix("# Results\n")
    body = MARKDOWN.render(text)

    def picture(match):
        place = path.parent / match[1]
        return f'src="{inlined(place)}"' if place.suffix == ".png" and place.exists() else match[0]

    def heading(match):
        name = re.sub(r"[^\w -]", "", html.unescape(match[1])).lower().replace(" ", "-")
        return f'<h4 id="finding-{name}">{match[1]}</h4>'

    body = re.sub(r'src="([^"]+)"', picture, body)
    body = re.sub(r"<h[23]>(.*?)</h[23]>", heading, body)
    body = re.sub(r'href="#', 'href="#finding-', body)
    body = re.sub(r'<a href="(?!#|https?:)[^"]*">(.*?)</a>', r"\1", body)  # files of the project
    return f'<h2 id="findings">Findings</h2><div class="wide">{body}</div>'


def annotated():
    """The text of page.html."""
    anchors = all_anchors()
    begin = prose((ROOT / "README.md").read_text().split("\n## ")[0].partition("\n")[2], anchors)
    parts = [f'<div class="wide">{begin}</div>', symbols()]
    parts += [chapter(file, anchors) for file in CHAPTERS] + [findings()]
    links = [("symbols", "symbols"), *((f[:-3], f) for f in CHAPTERS), ("findings", "findings")]
    title = "Compressed, sharpness-aware federated learning: the annotated chapters"
    return page(title, links, "\n".join(parts))


# ------------------------------------------------------------------------------------ the tutorial


def notebook():
    """The tutorial as a notebook without outputs."""
    import jupytext

    book = jupytext.read(ROOT / "classroom" / "tutorial.py", fmt="py:percent")
    book.metadata.pop("jupytext", None)
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"  # jupytext draws them at random
    return book


def cell_html(cell, station=""):
    """A cell of an executed notebook; station: its heading."""
    if cell.cell_type == "markdown":
        text = prose(cell.source)
        return re.sub(r"<h2>(\d)\.(.*?)</h2>", r'<h2 id="station-\1">\1.\2</h2>', text)
    parts = [code(cell.source)]
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            picture = data["image/png"].replace("\n", "")
            parts.append(
                f'<img alt="{html.escape(station)}" src="data:image/png;base64,{picture}">'
            )
        elif output.get("name") == "stdout":
            parts.append(f'<pre tabindex="0">{html.escape(output["text"])}</pre>')
    return "\n".join(parts)


def tutorial_html(book):
    """The page of an executed notebook."""
    first, *cells = book.cells
    title, _, rest = first.source.removeprefix("# ").partition("\n")
    links = [(f"station-{n}", f"station {n}") for n in range(1, 9)]
    parts, station = [prose(rest)], ""
    for cell in cells:
        parts.append(cell_html(cell, station))
        heads = re.findall(r"(?m)^## (.*)$", cell.source)
        station = heads[-1] if heads and cell.cell_type == "markdown" else station
    return page(title, links, f'<div class="wide">{"".join(parts)}</div>')


def build_tutorial(folder):
    """Write tutorial.ipynb, run it, and write tutorial.html."""
    import nbformat
    from nbclient import NotebookClient

    book = notebook()
    nbformat.write(book, folder / "tutorial.ipynb")
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    (folder / "tutorial.html").write_text(tutorial_html(book))


def main(argv):
    """The command: exit code 0 or 2."""
    folder = ROOT / "classroom"
    if argv == ["tutorial"]:
        build_tutorial(folder)
    elif not argv:
        (folder / "page.html").write_text(annotated())
    else:
        print("classroom.page: give nothing, or the word tutorial", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
