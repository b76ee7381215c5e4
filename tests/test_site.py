"""The documentation's site: every page is in the navigation, what the build reads is there, and it builds."""

import importlib
import re
from pathlib import Path

import pytest

from drpo import objectives
from drpo.spec import parse_spec
from drpo.train import metric_tables
from drpo.train.run_warnings import RULES
from support.documentation import CONFIG, DOCS, LINKS, ROOT, build_site, load, pages


def test_the_navigation_names_every_page_once():
    named = pages(LINKS.expanded(CONFIG["nav"], DOCS))
    assert sorted(named) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


def test_what_the_build_reads_is_there():
    assert all((ROOT / hook).is_file() for hook in CONFIG["hooks"])
    assert all((DOCS / sheet).is_file() for sheet in CONFIG["extra_css"])
    (handler,) = [plugin["mkdocstrings"] for plugin in CONFIG["plugins"] if isinstance(plugin, dict)]
    python = handler["handlers"]["python"]
    assert all((ROOT / path).is_file() for path in python["options"]["extensions"]) and python["paths"] == ["src"]
    pinned = (DOCS / "requirements.txt").read_text()
    assert all(re.search(rf"^{name}==\d", pinned, flags=re.M) for name in ("mkdocs", "mkdocs-material", "mkdocstrings"))


@pytest.mark.parametrize("path", sorted((DOCS / "reference").glob("*.md")), ids=lambda p: p.name)
def test_the_reference_names_modules_that_there_are(path: Path):
    for name in re.findall(r"^::: (\S+)", path.read_text(), flags=re.M):
        where = ROOT / "src" / Path(*name.split("."))
        assert where.with_suffix(".py").is_file() or (where / "__init__.py").is_file(), name


def test_the_reference_has_what_the_pages_use():
    """Whatever a page imports, or names in full, is defined in a module that the reference shows."""
    shown = {n for p in (DOCS / "reference").glob("*.md") for n in re.findall(r"^::: (\S+)", p.read_text(), flags=re.M)}
    text = "\n".join(p.read_text() for p in [*DOCS.rglob("*.md"), ROOT / "README.md"])
    used = {(m, n.strip()) for m, names in re.findall(r"^from (drpo\S*) import (.+)$", text, flags=re.M)
            for n in names.split(",")}  # fmt: skip
    used |= {tuple(name.rsplit(".", 1)) for name in re.findall(r"`(drpo(?:\.(?!yaml)\w+)+)`", text)}
    assert len(used) > 30 and not {f"{m}.{n}" for m, n in used if not shown & home(m, n)}
    assert not shown & home("drpo.lab.worker_pool", "PoolSize")


def home(module: str, name: str) -> set[str]:
    """The modules that a name may be looked up in: that which has it, and that which it comes from."""
    found = {module, f"{module}.{name}"}
    if module.startswith("drpo.adapters."):  # which need another framework
        return found
    thing = getattr(importlib.import_module(module), name, None)
    return found | {getattr(thing, "__module__", "")}


METRICS_PAGE = load(DOCS / "metrics_page.py")
KNOWN = {name for table in metric_tables.KINDS.values() for name in table}


def test_the_page_of_metrics_is_what_the_source_says():
    assert METRICS_PAGE.PAGE.read_text() == METRICS_PAGE.page(), "python docs/metrics_page.py"
    assert METRICS_PAGE.WARNINGS.read_text() == METRICS_PAGE.warnings_page(), "python docs/metrics_page.py"
    tables = {id(table) for name, table in vars(metric_tables).items() if name.endswith("_METRICS")}
    assert {id(table) for table in metric_tables.KINDS.values()} == tables
    assert {name for rule in RULES for name in rule.reads} <= KNOWN


def test_the_symptoms_name_metrics_that_there_are():
    named = set()
    for path in (DOCS / "objectives").glob("*.md"):
        symptoms = path.read_text().partition("## Symptoms")[2]
        named |= {
            n for cell in re.findall(r"^\| ([^|]*)\|", symptoms, flags=re.M) for n in re.findall(r"`(\w+)`", cell)
        }
    assert len(named) > 5 and named <= KNOWN | set(objectives.REGISTRY.entries), named - KNOWN


def parts(objective: objectives.Objective) -> list[object]:
    """What a sum or a product is made of; an objective itself."""
    summands = objectives.REGISTRY.summands(objective)
    return [objective] if summands is None else [factor for summand in summands for factor in summand.factors]


def test_every_objective_has_a_page_with_its_figure():
    text = {path.stem: path.read_text() for path in (DOCS / "objectives").glob("*.md")}
    figures = load(DOCS / "figures" / "objectives.py").FIGURES
    drawn = {
        part.__class__
        for specs in figures.values()
        for spec in specs
        for part in parts(parse_spec(spec, objectives.REGISTRY))
    }
    assert drawn >= {type(maker()) if name == "none" else maker for name, maker in objectives.REGISTRY.entries.items()}
    for name, specs in figures.items():
        assert (DOCS / "figures" / "objectives" / f"{name}.png").is_file()
        assert f"../figures/objectives/{name}.png" in text[name]
        assert all(f'"{spec}"' in text[name] for spec in specs)
        for heading in ("## From mathematics to code", "## Symptoms"):
            assert heading in text[name]


def sections(page: str) -> dict[str, str]:
    """The sections of a page by their titles."""
    parts = re.split(r"^## (.*)$", (DOCS / page).read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_each_symptom_has_its_sight_its_cause_and_a_command():
    symptoms = sections("troubleshooting.md")
    assert len(symptoms) >= 10
    for title, text in symptoms.items():
        assert all(head in text for head in ("**What you see.**", "**Why", "hat to do")), title
        assert re.search(r"^```bash\n(?:.*\n)*?drpo explain (\S+)$|^drpo doctor ", text, flags=re.M), title


def test_the_symptoms_page_names_every_warning_and_metrics_that_there_are():
    text = (DOCS / "troubleshooting.md").read_text()
    names = set(re.findall(r"`([a-z0-9]+(?:[_/][a-z0-9_]+)+)`", text))
    rules = {rule.name for rule in RULES}
    assert {name for name in rules if f"`{name}`" in text} == rules
    config = {"clip_cov", "kl_cov", "prob_diff"}
    assert len(names - rules) > 15 and {n for n in names - rules - config if metric_tables.find(n) is None} == set()


def test_every_figure_of_the_decision_page_is_in_a_page_that_its_line_links_to():
    text, checked = re.sub(r"^```.*?^```", "", (DOCS / "choosing.md").read_text(), flags=re.M | re.S), 0
    for line in text.splitlines():
        linked = "".join((DOCS / page).read_text() for page in re.findall(r"\]\(([\w/.]+\.md)[^)]*\)", line))
        plain = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", line)
        for figure in re.findall(r"\d+\.\d+%?", plain):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}", linked), (figure, line)
            checked += 1
    assert checked > 20


def test_the_cookbook_has_ten_recipes_with_a_block_each():
    recipes = sections("cookbook.md")
    assert len(recipes) == 10 and all("```bash" in text and "](" in text for text in recipes.values())


def test_the_glossary_is_in_order_and_says_something_of_each_word():
    rows = re.findall(r"^\| \*\*(.+?)\*\*.*? \| (.*?) \| .*\|$", (DOCS / "glossary.md").read_text(), flags=re.M)
    words = [word.lower() for word, _ in rows]
    assert len(words) > 40 and words == sorted(words) and all(len(meaning) > 5 for _, meaning in rows)


def test_ten_things_of_trl_are_one_page_from_the_start():
    """The page is linked from the start page; each thing leads to a page and a heading that there are."""
    assert "(coming_from.md)" in (DOCS / "index.md").read_text()
    text = sections("coming_from.md")["Ten things a TRL user looks for"]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10
    named = set(pages(LINKS.expanded(CONFIG["nav"], DOCS)))
    for theirs, ours, where in rows:
        links = re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", where)
        assert "`" in theirs + ours and links and all(not page or page in named for page, _ in links), theirs


@pytest.mark.parametrize(
    ("text", "source", "found"),
    [
        ("[a](../README.md)", "index.md", "a (`README.md`)"),
        ("[b](../../src/x.py)", "guides/g.md", "b (`src/x.py`)"),
        ("[`README.md`](../README.md)", "index.md", "`README.md`"),
        ("[c](other.md#top)", "guides/g.md", "[c](other.md#top)"),
        ("[d](https://example.org)", "index.md", "[d](https://example.org)"),
        ("![e](figures/f.png)", "index.md", "![e](figures/f.png)"),
        ("[f](#here)", "index.md", "[f](#here)"),
    ],
)
def test_links_out_of_the_site_say_where_the_file_is(text: str, source: str, found: str):
    assert LINKS.rewritten(text, source, None) == found


def test_short_code_is_marked_and_no_other():
    html = "<p><code>--updates</code> <code>none</code></p><pre><span></span><code><span>drpo</span> x\n</code></pre>"
    marked = LINKS.on_page_content(html + f"<code>{'x' * 33}</code>", None, None, None)
    assert marked.count('<code class="short">') == 1 and '<code class="short">--updates</code>' in marked


def test_with_a_repository_they_lead_there():
    found = LINKS.rewritten("[a](../src/x.py#L3)", "index.md", "https://host/drpo/")
    assert found == "[a](https://host/drpo/blob/main/src/x.py#L3)"


@pytest.mark.slow
def test_it_builds_without_a_warning_and_asks_no_network(tmp_path: Path):
    built = [p.read_text() for p in build_site(tmp_path).rglob("*.html")]
    assert len(built) > 30
    fetched = [u for t in built for u in re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"(https?://[^\"]+)", t)]
    assert not fetched, fetched
