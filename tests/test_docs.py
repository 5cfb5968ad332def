"""What the documentation says: that its code runs, that messages which it quotes are
those of the source, and that its links lead somewhere."""

import ast
import functools as ft
import pathlib
import re
import textwrap

import eqx_bilevel as eb
import pytest


root = pathlib.Path(__file__).parent.parent
docs = root / "docs"
pages = sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))


#
# Code
#


def _code(text: str) -> list[str]:
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in blocks]


# Run elsewhere: `test_readme.py`.
_RUN_ELSEWHERE = ("examples.md",)
# By how they begin: they need more than one device.
_NOT_RUNNABLE = ("auto = jax.sharding.AxisType.Auto",)


@ft.cache
def _quick_example() -> dict:
    # The names that the example on the home page leaves behind, at fewer points.
    code = "\n".join(_code((root / "README.md").read_text()))
    few, num = re.subn(r"\b(?:300|50), (?=key|faces)", "12, ", code)
    assert num == 4
    names: dict = {}
    exec(few, names)
    return names


def _quick(learn):
    # Whether learning ends well is tested elsewhere.
    def quick_learn(*args, **kwargs):
        return learn(*args, **(kwargs | dict(steps=1, scale_search=False, throw=False)))

    return quick_learn


_with_code = [p for p in pages if _code((docs / p).read_text())]


@pytest.mark.parametrize("page", [p for p in _with_code if p not in _RUN_ELSEWHERE])
def test_code_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # Files are written.
    monkeypatch.setattr(eb, "learn", _quick(eb.learn))
    names = dict(_quick_example())
    for code in _code((docs / page).read_text()):
        if not code.startswith(_NOT_RUNNABLE):
            exec(code.replace("300", "30"), names)


def test_no_code_is_skipped_without_need():
    blocks = [code for p in pages for code in _code((docs / p).read_text())]
    assert len(blocks) > 15
    for start in _NOT_RUNNABLE:
        assert sum(code.startswith(start) for code in blocks) == 1


#
# Messages
#


def _text(node: ast.AST) -> str | None:
    # A string of the source as a regular expression, with anything for its values.
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [_text(v) if isinstance(v, ast.Constant) else ".+" for v in node.values]
        return "".join(map(str, parts))
    return None


@ft.cache
def _messages() -> list[re.Pattern]:
    found = [re.escape(eb.RESULTS[getattr(eb.RESULTS, k)]) for k in _results]
    for path in (root / "eqx_bilevel").rglob("*.py"):
        found += map(_text, ast.walk(ast.parse(path.read_text())))
    return [re.compile(text) for text in found if text and len(text) > 20]


_results = [
    "nonlinear_max_steps_reached",
    "nonfinite_data",
    "singular_gram",
    "nonfinite_operator",
    "no_scale",
    "duplicate_points",
]


def _quoted(text: str) -> list[str]:
    blocks = re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [" ".join(block.split()) for block in blocks]


def _is_known(message: str) -> bool:
    return any(pattern.fullmatch(message) for pattern in _messages())


def test_quoted_messages_are_those_of_the_source():
    quoted = [m for p in pages for m in _quoted((docs / p).read_text())]
    assert len(quoted) > 10
    assert [m for m in quoted if not _is_known(m)] == []


def test_other_messages_are_not_found():
    assert _is_known("`max_steps` must be a positive integer, got 0.")
    assert not _is_known("`max_steps` must be a positive number, got 0.")


#
# Links
#


def _slug(title: str) -> str:
    # As Python-Markdown does it.
    title = re.sub(r"[^\w\s-]", "", title).strip().lower()
    return re.sub(r"[-\s]+", "-", title)


def _without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def _included(text: str) -> str:
    # With the files that it includes.
    def read(match):
        name, _, section = match[1].partition(":")
        found = (root / name).read_text()
        if section:
            found = found.split(f"[start:{section}] -->")[1]
            found = found.split(f"<!-- --8<-- [end:{section}]")[0]
        return found

    return re.sub(r'^--8<-- "(.*?)"$', read, text, flags=re.MULTILINE)


def _anchors(page: pathlib.Path) -> set[str]:
    text = _without_code(_included(page.read_text()))
    return {_slug(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def _broken(text: str, folder: pathlib.Path) -> list[str]:
    # Links of a text in this folder that lead nowhere.
    links = re.findall(r"\]\(([^)\s]+)\)", _without_code(text))
    return [link for link in links if not _leads_somewhere(link, folder)]


def _leads_somewhere(link: str, folder: pathlib.Path) -> bool:
    if re.match(r"[a-z]+://", link):
        return True
    path, _, anchor = link.partition("#")
    page = (folder / path).resolve() if path else None
    tutorial = root / "tutorials" / f"{pathlib.Path(path).stem}.py"
    if page is not None and page.parent == docs / "tutorials" and tutorial.exists():
        return True  # A page that is made when the site is built.
    if page is None or not page.exists():
        return False
    return not anchor or anchor in _anchors(page)


@pytest.mark.parametrize("page", pages)
def test_links_lead_somewhere(page):
    path = docs / page
    text = _included(path.read_text())
    # Of a page itself.
    text = re.sub(r"\]\(#", f"]({path.name}#", text)
    assert _broken(text, path.parent) == []


def test_links_of_the_readme_and_of_docstrings_lead_somewhere():
    assert _broken((root / "README.md").read_text(), root) == []
    num_links = 0
    for path in (root / "eqx_bilevel").rglob("*.py"):
        links = re.findall(r"\]\((\.\./[^)\s]+)\)", path.read_text())
        num_links += len(links)
        bad = [link for link in links if not _leads_somewhere(link, docs / "api")]
        assert bad == [], path
    assert num_links > 3


def test_broken_links_are_found():
    text = "[a](./method.md#the-outer-problem) [b](./method.md#nothing) [c](no.md)"
    assert _broken(text, docs) == ["./method.md#nothing", "no.md"]


def _external(text: str) -> list[str]:
    # XML namespaces are no links.
    found = re.findall(r"""https?://[^\s)>"'`\]}]+""", text)
    return [url.rstrip(".,;") for url in found if "www.w3.org" not in url]


def _sources() -> list[pathlib.Path]:
    named = ["README.md", "CHANGELOG.md", "pyproject.toml", "mkdocs.yml"]
    folders = ["docs", "eqx_bilevel", "tutorials", "benchmarks"]
    below = [p for folder in folders for p in (root / folder).rglob("*")]
    return [root / n for n in named] + [p for p in below if p.suffix in (".md", ".py")]


def _canonical(url: str) -> str:
    # The same for what leads to the same place. An organisation may change its name,
    # and only one of its names should be in use.
    url = re.sub(r"^https?://(www\.)?", "", url.lower()).rstrip("/")
    url = re.sub(
        r"^arxiv\.org/(abs|pdf|html)/([\d.]+\d)(v\d+)?(\.pdf)?", r"arxiv/\2", url
    )
    url = re.sub(r"^github\.com/[^/]+/([^/]+?)(\.git)?$", r"github/\1", url)
    return re.sub(r"/(latest|stable|main|master)/", "/", url)


def _doubtful(urls: list[str]) -> set[str]:
    by_place: dict[str, set[str]] = {}
    for url in urls:
        by_place.setdefault(_canonical(url), set()).add(url)
    variants = [same for same in by_place.values() if len(same) > 1]
    plain = {url for url in urls if not url.startswith("https://")}
    return plain.union(*variants)


def test_external_links_are_secure_and_written_in_one_way():
    urls = [url for path in _sources() for url in _external(path.read_text())]
    assert len(set(urls)) > 15
    assert _doubtful(urls) == set()


def test_doubtful_links_are_found():
    good = ["https://arxiv.org/abs/2103.12959", "https://github.com/google/jaxopt"]
    assert _doubtful(good) == set()
    for bad in (
        "http://example.org/page",
        "https://arxiv.org/pdf/2103.12959v2",
        "https://www.github.com/google/jaxopt/",
        "https://github.com/jaxopt/jaxopt",
    ):
        assert bad in _doubtful([*good, bad])


def test_texts_of_links_to_articles_are_their_numbers():
    num_links = 0
    for path in _sources():
        for text, number in re.findall(
            r"\[arXiv:([^\]]*)\]\(https://arxiv\.org/abs/([^)]*)\)", path.read_text()
        ):
            assert text == number and re.fullmatch(r"\d{4}\.\d{5}", number), path
            num_links += 1
    assert num_links > 5


def test_all_pages_are_in_the_navigation():
    navigation = (root / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    assert [p for p in pages if f": {p}\n" not in navigation + "\n"] == []
