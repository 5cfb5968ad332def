"""Runs the tutorials and makes pages of them: `tutorials/x.py`, in the percent format
of Jupytext, becomes `tutorials/x.md` with what it printed and drew.

They are Markdown like all other pages, so that formulas, cross-references and links
work and are checked, which pages converted by way of HTML do not offer. What was run is
kept in `.cache/tutorials` for as long as neither the script nor the library changes.
"""

import base64
import concurrent.futures
import hashlib
import os
import pathlib

import jupytext
import nbclient
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


root = pathlib.Path(__file__).parent.parent
cache = root / ".cache" / "tutorials"

# Compiles faster. The kernels inherit it.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# Two run at a time: threads of one that wait in a busy loop take the other's core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# As in the FAQ: solves under `vmap` could hang.
os.environ.setdefault("NPROC", "8")

# Sharp on all screens, and readable on light and dark pages.
_FIGURES = """
import matplotlib_inline.backend_inline as inline
inline.set_matplotlib_formats("retina", facecolor="none")
"""

_FOOT = """
---

This page is the script `tutorials/{name}.py` of the repository, and what it shows when
it is run.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    scripts = [
        script
        for script in sorted((root / "tutorials").glob("*.py"))
        if script.read_text().startswith("# %% [markdown]")
    ]
    # Most of a run is compiling, on one core, in a process of its own: two at a time.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        notebooks = list(pool.map(_run, scripts))
    for script, notebook in zip(scripts, notebooks):
        pictures, text = _as_markdown(notebook, script.stem)
        for name, data in pictures.items():
            page = File.generated(config, f"tutorials/{name}", content=data)
            files.append(page)
        page = f"tutorials/{script.stem}.md"
        files.append(File.generated(config, page, content=text))
    return files


def _run(script: pathlib.Path) -> nbformat.NotebookNode:
    sources = [script, *sorted((root / "eqx_bilevel").rglob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    done = cache / f"{script.stem}-{digest.hexdigest()[:16]}.ipynb"
    if done.exists():
        return nbformat.read(done, as_version=4)
    notebook = jupytext.read(script)
    figures = nbformat.v4.new_code_cell(_FIGURES)
    notebook.cells.insert(0, figures)
    resources = {"metadata": {"path": str(root)}}
    client = nbclient.NotebookClient(notebook, kernel_name="python3", timeout=600)
    client.resources = resources
    client.execute()
    notebook.cells.pop(0)
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob(f"{script.stem}-*.ipynb"):
        old.unlink()
    nbformat.write(notebook, done)
    return notebook


def _as_markdown(notebook, name: str) -> tuple[dict[str, bytes], str]:
    pictures, parts = {}, []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        printed, drawn = _shown(cell.outputs)
        if printed:
            parts.append(f"``` {{ .text .no-copy .output }}\n{printed}\n```")
        for picture, width in drawn:
            file = f"{name}_{len(pictures)}.png"
            pictures[file] = picture
            wide = " .wide" if width > 600 else ""
            attributes = f"{{ .output{wide} width={width} }}"
            parts.append(f"![What the code above draws]({file}){attributes}")
    parts.append(_FOOT.format(name=name))
    return pictures, "\n\n".join(parts)


def _shown(outputs) -> tuple[str, list[tuple[bytes, int]]]:
    # All that was printed, and each picture with its width on the page. The value of a
    # cell that draws is only what it drew into.
    printed, value, drawn = [], [], []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                raise RuntimeError(f"A tutorial wrote to stderr: {output.text}")
            printed.append(output.text.rstrip())
        elif "image/png" in output.data:
            picture = base64.b64decode(output.data["image/png"])
            drawn.append((picture, output.metadata["image/png"]["width"]))
        else:
            value.append(output.data["text/plain"])
    return "\n".join(printed + ([] if drawn else value)), drawn
