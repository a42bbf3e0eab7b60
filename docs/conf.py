"""The static site (`make site`): README, docs and every notebook with stored outputs, read in place and never executed.

The source folder is the root of the repository, so relative links are the same here and on a code-hosting site.
"""

import json
import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
project, html_title = "GRPO under reward noise", "GRPO under reward noise"
extensions = ["myst_nb", "sphinx_copybutton", "sphinx-mathjax-offline"]
root_doc = "README"


def pages(*patterns: str) -> list[str]:
    return [p.relative_to(ROOT).as_posix() for pattern in patterns for p in sorted(ROOT.glob(pattern))]


STUDIES = sorted(pages("outputs/*/04_analysis.ipynb"), key=lambda p: (
    p.split("/")[1] not in ("language-model-smol", "tiny"), p))
HELPERS = [f"notebooks/helpers/{n}.ipynb" for n in ("theory", "noise", "rewards", "answers", "statistics")]
HELPERS += [p for p in pages("notebooks/helpers/*.ipynb") if p not in HELPERS]
DOCS = pages("notebooks/START.md", "docs/*.md", "data/README.md")

# A source notebook has no outputs: the site shows an executed copy in its place, that of the default study if it can.
SHOWN = {}
for source in pages("notebooks/*.ipynb", "notebooks/appendix/*.ipynb"):
    copies = pages(f"outputs/tiny/{Path(source).stem}*.ipynb", f"outputs/*/{Path(source).name}",
                   f"outputs/*/{Path(source).stem}*.ipynb")
    SHOWN[source] = copies[0] if copies else source
STEPS, APPENDIX = ([shown for source, shown in SHOWN.items() if shown not in STUDIES and ("appendix" in source) == side]
                   for side in (False, True))
OTHERS = [p for p in pages("outputs/*/*.ipynb") if p not in STUDIES + STEPS + APPENDIX]
SHOWN["notebooks/helpers"] = HELPERS[0]
TREES = {"Studies": STUDIES, "Why": HELPERS, "Step by step": STEPS, "Appendix": APPENDIX, "Reference": DOCS,
         "More executed notebooks": sorted(OTHERS, key=lambda p: p.rsplit("/", 1)[1])}
include_patterns = ["README.md", *sum(TREES.values(), [])]
exclude_patterns = [".*", "build", "models", "data/*/**", "outputs/runs/**", "outputs/*/runs/**"]

# --- notebooks ---------------------------------------------------------------------------------------------------
WIDGET = "application/vnd.jupyter.widget-view+json"
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Code", "Hide the code"
nb_ipywidgets_js = {}  # would be fetched from a CDN
highlight_language = "text"  # of code blocks that name none; notebooks name theirs
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp, .go"

# --- look --------------------------------------------------------------------------------------------------------
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = False
html_show_copyright = False
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False, "show_navbar_depth": 1,
                      "home_page_in_toc": True, "show_toc_level": 2, "navbar_start": [], "navbar_center": [],
                      "navbar_end": [], "navbar_persistent": [], "footer_content_items": []}
html_js_files = ["site.js"]


# Pages by the names that texts give them in code type: 03_eval, appendix/audit, docs/results.md, with and without ends.
NAMED = {}
for source in [*SHOWN, *HELPERS, *DOCS]:
    whole = source.removesuffix("/")
    for name in (whole, whole.removeprefix("notebooks/")):
        NAMED[name] = NAMED[name.removesuffix(".ipynb")] = SHOWN.get(source, source)
del NAMED["helpers"], NAMED["notebooks/helpers"]  # folders
# What stays as it is: blocks of code, headings, links.
AS_IT_IS = re.compile(r"(^```.*?^```$|^#[^\n]*$|\[[^\]\n]*\]\([^)\n]*\))", re.M | re.S)
IN_CODE_TYPE = re.compile(r"(?<!`)`([\w./-]+)`(?!`)")


def with_links(text: str, page: Path, rendered: bool = False) -> str:
    """Markdown in which the names of other pages are links. rendered: to .html, where Sphinx does not look."""
    def link(match):
        if match[1] not in NAMED:
            return match[0]
        target = Path(NAMED[match[1]])
        own = page.parent / target.name  # of the same study
        target = own if own.as_posix() in include_patterns else target
        if target == page:
            return match[0]
        target = target.with_suffix(".html") if rendered else target
        return f"[{match[0]}]({os.path.relpath(target, page.parent)})"

    parts = AS_IT_IS.split(text)
    return "".join(part if i % 2 else IN_CODE_TYPE.sub(link, part) for i, part in enumerate(parts))


def analysis(cells: list[dict], study: str) -> list[dict]:
    """An analysis opens with its computed title, and what is about code is left out.

    A study that repeats another has the other's title, so its own name stands behind it.
    """
    shown = [c for c in cells if c.get("outputs") or c["cell_type"] == "markdown"
             and "about-code" not in c["metadata"].get("tags", [])]
    heading = "".join(shown[0]["outputs"].pop(0)["data"]["text/markdown"])
    if study.endswith("-again"):
        heading += f" ({study})"
    return [{"cell_type": "markdown", "id": "heading", "metadata": {}, "source": heading}, *shown]


def notebook(text: str, page: str) -> str:
    """A rendered notebook: its code is folded, pages are linked, it says its study, and it has no progress bars."""
    found = json.loads(text)
    for cell in found["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_links("".join(cell["source"]), Path(page))
            continue
        cell["metadata"]["tags"] = ["hide-input"]
        cell["outputs"] = [o for o in cell["outputs"] if WIDGET not in o.get("data", {})]
        for data in [o["data"] for o in cell["outputs"] if "text/markdown" in o.get("data", {})]:
            data["text/markdown"] = with_links("".join(data["text/markdown"]), Path(page), rendered=True)
    if page in STUDIES:
        found["cells"] = analysis(found["cells"], page.split("/")[1])
    elif page.startswith("outputs/"):
        _, study, name = page.split("/")
        first = found["cells"][0]
        heading, *rest = "".join(first["source"]).split("\n")
        other = re.sub(r"^\w+?-|\.ipynb$", "", name) if "-" in name else ""
        heading = f"{heading} · {', '.join(filter(None, (study, other)))}"
        first["source"] = "\n".join([heading, *rest])
    return json.dumps(found)


def prepare(app, docname, source):
    """Called with the text of each page. Links to a source notebook lead to its executed copy."""
    page = Path(app.env.doc2path(docname)).relative_to(ROOT)
    if page.suffix == ".ipynb":
        source[0] = notebook(source[0], page.as_posix())
    else:
        source[0] = with_links(source[0], page)

    def link(match):
        target = said = os.path.normpath(page.parent / match[1])
        if not (ROOT / said).exists():  # an executed copy has the links of its source
            places = (os.path.normpath(Path(folder) / match[1]) for folder in ("notebooks", "notebooks/appendix"))
            target = next((place for place in places if (ROOT / place).exists()), said)
        shown = SHOWN.get(target, target)
        return match[0] if shown == said else f"]({os.path.relpath(shown, page.parent)}{match[2] or ''})"

    source[0] = re.sub(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)", link, source[0])
    if docname == root_doc:
        trees = [["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```"]
                 for caption, entries in TREES.items() if entries]
        source[0] += "\n\n" + "\n".join(sum(trees, [])) + "\n"


def finish(app, error):
    """Check all pages; the front page is also index.html."""
    if error is None:
        for page in Path(app.outdir).rglob("*.html"):
            check(page, page.relative_to(app.outdir).with_suffix("").as_posix() in app.env.found_docs)
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def check(page: Path, is_ours: bool):
    """RuntimeError if a page loads something from elsewhere, or if one of ours lacks what every page has."""
    text = page.read_text()
    found = re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?:https?:)?//[^\"]+", text)
    if found:
        raise RuntimeError(f"{page.name} loads something from elsewhere: {found[0]}")
    if is_ours and "bd-sidebar-secondary" not in text:
        raise RuntimeError(f"{page.name} has no contents beside it: give the page headings of the second level")
    if is_ours and "theme-switch-button" not in text:
        raise RuntimeError(f"{page.name} cannot be made dark")
    if text.count("cell_input") != text.count("tag_hide-input"):
        raise RuntimeError(f"{page.name} shows code that is folded elsewhere")


def setup(app):
    app.connect("source-read", prepare)
    app.connect("build-finished", finish)
