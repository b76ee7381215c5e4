"""What `math_verify` and `exact_number` read as what: kinds of writing, with members that must and must not match."""

import json
import os
import time
from pathlib import Path

import pytest

import drpo.rewards.math
from drpo.rewards import exact_number
from drpo.rewards.extract import boxed, final_answer
from drpo.rewards.math import math_verify
from drpo.rewards.normalise import RULES, normalise
from drpo.rewards.number import last_number, read_number
from drpo.rewards.wording import choice, comparison
from drpo.types import Problem

CASES = Path(os.environ.get("DRPO_SHARED", Path(__file__).parents[2] / "shared")) / "cases"
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "rewards.md"


def score(gold, text, reward=math_verify):
    return reward(Problem.of_text("0", "", gold), text)


def disagreements(cases, reward=math_verify):
    return [(gold, text, want) for gold, text, want in cases if score(gold, text, reward) != want]


def shared(name):
    file = CASES / f"{name}.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there; set DRPO_SHARED to the folder that holds cases/")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("name", "reward"), [("math_answers", math_verify), ("exact_number", exact_number)])
def test_the_shared_cases_have_their_right_scores(name, reward):
    assert disagreements([(c["gold"], c["text"], c["score"]) for c in shared(name)], reward) == []


SAME = {
    "grouped digits": [
        ("10\\,000", "10,000"),
        ("1234567", "1\\,234\\,567"),
        ("1234567", "1 234 567"),
        ("1234567", "1\u202f234\u2009567"),
        ("1000", "1{,}000"),
    ],
    "mixed numbers": [("2 1/2", "2.5"), ("-5/2", "-2 1/2"), ("7/2", "3½"), ("5/4", "1\\frac14")],
    "units of several words and signs": [
        ("9.8", "9.8 \\text{ m/s}^2"),
        ("9.8", "9.8~\\mathrm{m/s^2}"),
        ("10\\text{ m/s}", "10"),
        ("6", "6\\text{ sq. in.}"),
        ("6", "6 sq ft"),
        ("12\\pi", "12\\pi cm^3"),
        ("\\frac34", "\\frac34 of a mile"),
        ("42", "\\text{42 ways}"),
    ],
    "per cent": [
        ("12.5", "12.5\\%"),
        ("12.5\\%", "0.125"),
        ("33\\frac13", "33\\frac{1}{3}\\%"),
        ("\\frac13", "33\\tfrac13\\%"),
    ],
    "unions of inequalities": [
        ("(-\\infty,1)\\cup(3,\\infty)", "x<1 or x>3"),
        ("(-\\infty,1]\\cup[3,\\infty)", "x \\ge 3 \\text{ or } x \\leq 1"),
        ("[0,1)\\cup(3,4]", "0\\le x<1 or 3 < x ≤ 4"),
        ("x<1 \\text{ or } x>3", "(-\\infty,1)\\cup(3,\\infty)"),
    ],
    "degrees under a sine": [
        ("\\frac14", "\\frac{\\cos 60^\\circ}{2}"),
        ("1", "2\\sin{30^{\\circ}}"),
        ("1", "2(\\sin 30°)"),
        ("\\frac34", "\\cos^2\\left(30^\\circ\\right)"),
    ],
    "logarithms to base ten": [("\\log_{10} 2", "\\lg 2")],
    "colours": [("13", "\\color{red}13"), ("13", "\\textcolor{blue}{13}"), ("\\frac12", "\\color{red}{\\frac{1}{2}}")],
    "decimals to what both have": [
        ("0.1234567", "0.123457"),
        ("0.333333", "0.3333333333"),
        ("0.3", "0.30000000000000004"),
    ],
    "labels of choices": [
        ("7", "\\textbf{(B) } 7"),
        ("7", "\\mathrm{(B)}~7"),
        ("7", "(B) 7"),
        ("\\textbf{(B)}\\ 7", "7"),
        ("\\textbf{(B)}\\ 7", "B"),
    ],
    "choices": [
        ("\\text{(C)}", "C. 12"),
        ("C", "\\textbf{(C)}\\ 12"),
        ("C", "\\text{Option C}"),
        ("C", "C: 12"),
        ("C", "c"),
    ],
    "degrees and units": [
        ("45^\\circ", "45 degrees"),
        ("25", "25°C"),
        ("12", "12 square meters"),
        ("12\\text{ inches}", "12"),
        ("72", "72 \\text{ miles/hour}"),
        ("16\\pi", "16\\pi\\text{ in}^2"),
    ],
    "signs": [
        ("-\\frac12", "\u2013\\frac12"),
        ("(-1,-2)", "(\u2013 1, \u2212 2)"),
        ("-5", "- 5"),
        ("x=-5", "x = \u20135"),
    ],
    "punctuation and delimiters": [
        ("5.", "5."),
        ("5", "$5$."),
        ("5", "**5**"),
        ("5", "\\(5\\)"),
        ("5", "\\underline{5}"),
    ],
    "repeating decimals": [("1/7", "0.\\overline{142857}"), ("1/6", "0.1\\bar{6}"), ("1/3", "0.(3)")],
    "characters": [
        ("2\\sqrt3", "2√3"),
        ("\\sqrt{x+1}", "√(x+1)"),
        ("(-\\infty,\\infty)", "(\u2212∞, ∞)"),
        ("2\\pi", "2π"),
        ("x^2", "x²"),
        ("5", "\uff15"),
    ],
    "currencies": [("5", "£5"), ("5", "5€"), ("5", "5 euros"), ("5", "\\$5.00")],
    "powers of ten": [("1.5e-3", "0.0015"), ("6.02e23", "6.02\\times 10^{23}"), ("5000000", "5 \\text{ million}")],
    "roots of positive letters": [("\\sqrt{\\frac{a}{b}}", "\\frac{\\sqrt{a}}{\\sqrt{b}}"), ("x^{3/2}", "x\\sqrt{x}")],
    "inequalities": [("(1,3]", "1 < x ≤ 3"), ("[2,\\infty)", "x \\ge 2"), ("x \\le 2", "(-\\infty,2]")],
    "words": [("no", "\\text{No}."), ("no solution", "\\text{No  solution}"), ("true", "True"), ("是", "是")],
    "letters that are a product": [("xy", "yx"), ("abc", "cab")],
    "bases": [
        ("1011_2", "1011_{\\text{two}}"),
        ("1011_2", "1011 (base 2)"),
        ("3A_{16}", "3a_{16}"),
        ("1011_2", "1011"),
    ],
    "dates, times and ranges": [("2023-10-05", "2023\u201310\u201305"), ("12:30", "12:30 \\text{ PM}"), ("3:4", "6:8")],
    "lists with dots": [("1, 2, \\ldots, n", "1,2,\\dots,n"), ("1, 2, \\ldots, n", "1, 2, ..., n")],
}
DIFFERENT = {
    "small numbers": [
        ("10^{-20}", "10^{-21}"),
        ("e^{-50}", "e^{-60}"),
        ("(\\frac1{2004!},1)", "(\\frac1{2006!},1)"),
        ("\\{2^{-99},2\\}", "\\{2^{-98},2\\}"),
        ("0.0000005", "0.0000004"),
        ("xe^{-50}", "xe^{-60}"),
        ("0.1234567", "0.1234568"),
        ("1.0000001", "1.0000002"),
    ],
    "per cent": [("12.5", "1.25\\%"), ("0.125", "125\\%"), ("\\frac{1}{300}", "33\\frac13\\%")],
    "unions of inequalities": [
        ("(-\\infty,1)\\cup(3,\\infty)", "x \\le 1 or x>3"),
        ("x<1 or x>3", "1<x<3"),
        ("x<1 or x>3", "x<1"),
    ],
    "degrees under a sine": [("\\frac12", "\\sin 30"), ("2\\sin 18^\\circ", "2\\cos 18^\\circ")],
    "grouped digits": [("10", "10\\,000"), ("0", "10\\,000"), ("10 000", "10001")],
    "mixed numbers": [("1", "1 1/4"), ("1/4", "1 1/4")],
    "labels of choices": [("7", "\\textbf{(B)}\\ 8"), ("\\textbf{(B)}\\ 7", "\\textbf{(C)}\\ 8")],
    "choices": [("C", "B. 12"), ("C", "C or D"), ("C", "B, C"), ("C", "C = 12")],
    "units": [
        ("2m", "2"),
        ("2", "2ab"),
        ("5", "5 xy"),
        ("\\pi r^2 h", "\\pi r^2"),
        ("5", "5 million"),
        ("5", "5 or 6"),
        ("5", "5/6 of a cake"),
        ("42", "\\text{42 or 43}"),
    ],
    "signs": [("5", "\u20135"), ("5", "3\u20135"), ("-2", "3\u20135"), ("\\pm 3", "3")],
    "repeating decimals": [("0.3", "0.\\overline{3}"), ("\\frac13", "0.33")],
    "roots": [("|x|", "x"), ("\\sqrt{x^2}", "x"), ("\\ln|x|", "\\ln x"), ("\\sqrt{ab}", "\\sqrt a + \\sqrt b")],
    "inequalities": [("(-\\infty,2]", "x<2"), ("(-\\infty,2]", "x \\ge 2")],
    "words": [
        ("yes", "sey"),
        ("stop", "pots"),
        ("\\text{no}", "\\text{on}"),
        ("Ann", "Anna"),
        ("是", "否"),
        ("AB", "BA"),
    ],
    "names with digits": [("Grade 5", "Grade 6"), ("Grade 5", "5"), ("5 October 2023", "5 November 2023")],
    "bases": [("12_3", "12_4"), ("1011_2", "11"), ("A5_{16}", "A6_{16}")],
    "dates, times and ranges": [("2023-10-05", "2023-05-10"), ("10-12", "-2"), ("3:45", "3:46"), ("1.2.3", "1.2.4")],
    "lists with dots": [
        ("2,4,\\ldots,2n", "2,4,8,\\ldots,2^n"),
        ("1+2+\\cdots+n", "1+3+\\cdots+n"),
        ("1,2,3,\\ldots", "1,2,4,\\ldots"),
        ("1,2,\\ldots,10", "1,2,10"),
    ],
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_answer_written_otherwise_scores_1(kind):
    assert disagreements([(gold, f"So \\boxed{{{text}}}.", 1.0) for gold, text in SAME[kind]]) == []


@pytest.mark.parametrize("kind", DIFFERENT)
def test_another_answer_scores_0(kind):
    assert disagreements([(gold, f"So \\boxed{{{text}}}.", 0.0) for gold, text in DIFFERENT[kind]]) == []


STATED = [
    ("5", "<think>\\boxed{3}</think><answer>5</answer>", 1),
    ("3", "<think>\\boxed{3}</think><answer>5</answer>", 0),
    ("5", "<answer>The answer is 5.</answer>", 1),
    ("C", "The answer is (C).", 1),
    ("C", "**Answer: C**", 1),
    ("C", "The correct option is\n\n**C**", 1),
    ("C", "The answer is C or D.", 0),
    ("C", "The correct answer is **(C)**.", 1),
    ("C", "A is wrong. So the correct choice is C.", 1),
    ("C", "The answer is \\(C\\).", 1),
    ("C", "The answer is C, since A is wrong.", 1),
    ("C", "Thus, option (C) is correct.", 1),
    ("A", "The answer is C, since A is wrong.", 0),
    ("A", "The answer is a bit tricky.", 0),
    ("2", "The answer is 2, as 2 + 2 = 4.", 1),
    ("4", "The answer is 2, as 2 + 2 = 4.", 0),
    ("\\frac12", "The answer is $\\frac{1}{2}$ (and not $\\frac{1}{3}$).", 1),
    ("1,2", "The answer is 1 and 2.", 1),
    ("10", "5 apples, so there are 10 apples", 1),
    ("no", "No, because 3 < 4.", 1),
    ("east", "The answer is east.", 1),
    ("no", "The answer is on.", 0),
    ("1", "The answer is 1 1/4.", 0),
    ("15", "So the area is $15\\text{ cm}^2$.", 1),
    ("\\sqrt2", "The answer is √2.", 1),
    ("10000", "So we get 10\\,000 in all.", 1),
    ("6", "$\\boxed{5}$\n\nWait.\n\n$\\boxed{6}$", 1),
    ("5", "\\boxed{5}. Wait \\boxed{6}", 0),
    ("1,2,3", "$\\boxed{1}$, $\\boxed{2}$, and $\\boxed{3}$", 1),
    ("2", "\\boxed{1} and \\boxed{2}", 0),
    ("5", "\\boxed{5}\n\\boxed{", 1),
    ("5", "\\boxed{\\boxed{5}}", 1),
    ("5", "\\boxed{}", 0),
    ("1011_2", "The answer is $1011_3$.", 0),
]


def test_the_answer_is_found_where_the_text_states_it():
    assert disagreements(STATED) == []


READ = [
    ("\u2212 5", "-5"),
    ("is \u2013 5", "-5"),
    ("is minus 5", "-5"),
    ("is **-5**", "-5"),
    ("x - 4", "4"),
    ("pages 3 \u2013 5", "5"),
    ("- 5\n- 6", "6"),
    ("1\u2009234\u00a0567.5", "567.5"),
    ("1\u202f234\u202f567.5", "1234567.5"),
    ("of 100 200 300", "300"),
    ("\uff15\uff10", "50"),
    ("-\\frac12", "-1/2"),
    ("\\frac{-3}{4}", "-3/4"),
    ("1\\frac{1}{2}", "3/2"),
    ("1 1/2", "1.5"),
    ("1½", "1.5"),
    ("10³", "1000"),
    ("10**-2", "0.01"),
    ("1.2 \\times 10^{-3}", "0.0012"),
    ("5 cm^2", "5"),
    ("2 million", "2000000"),
    ("10/05/2023", "2023"),
]


@pytest.mark.parametrize(("text", "number"), READ)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == read_number(number)


@pytest.mark.parametrize(
    "text", ["10^10^10", "10^{10^{10}}", "10^999999", "10^9999999999", "5/0", "(3+4)^2", "2^0.5", "0^0"]
)
def test_what_is_no_plain_number_is_read_at_once_as_none(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    "text", ["\\text{" * 20_000, "x<1 or " * 10_000, "5" + " m/s" * 20_000, "E" * 50_000, "~" * 50_000]
)
def test_reading_an_answer_is_linear_in_a_hostile_one(text):
    start = time.process_time()
    choice(text), normalise(text), comparison("C")(text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 50_000, "{" * 200_000, "\\boxed{1}," * 20_000, "<answer>" * 50_000, "answer is " * 50_000]
)
def test_finding_the_answer_is_linear_in_a_hostile_text(text):
    start = time.process_time()
    final_answer(text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("answer", ["1e31e-5" * 200, "{ " * 100 + "}" * 100, "e^{\\left(" * 100 + "\\right)}" * 100])
def test_a_loop_of_the_model_is_a_wrong_answer_that_is_not_read(answer, monkeypatch):
    read, parse = [], drpo.rewards.math.parse
    monkeypatch.setattr(
        drpo.rewards.math, "parse", lambda text, *a, **k: parse(text, *a, **k) if len(text) < 99 else read.append(text)
    )
    assert score("5", f"So \\boxed{{{answer}}}.") == 0.0
    assert read == []


@pytest.mark.parametrize("text", ["\\boxed{%s}", "so $%s$", "The answer is %s"])
def test_integrals_without_end_are_not_read(text, monkeypatch):
    """The library's grammar takes 16 s for twenty."""
    read, parse = [], drpo.rewards.math.parse
    monkeypatch.setattr(drpo.rewards.math, "parse", lambda text, *a, **k: read.append(text) or parse("", *a, **k))
    assert score("5", text % ("\\int2" * 20)) == 0.0
    assert not any("int" in text for text in read[1:])  # the first is the problem's answer
    monkeypatch.undo()
    assert score("5", "$" + "\\int x dx+" * 6 + "1$, so $5$") == 1.0


def test_a_long_answer_to_a_long_one_is_read():
    long = " + ".join(f"x^{{{i}}}" for i in range(120))
    assert score(long, f"\\boxed{{{long}}}") == 1.0


def test_boxes_are_whole_and_the_last_counts():
    assert boxed("\\boxed{\\frac{1}{2}} and \\fbox{\\{3\\}}") == "\\frac{1}{2}, \\{3\\}"
    assert boxed("\\boxed5, and then \\boxed {6}") == "6"
    assert boxed("\\boxed{1") is None


def test_the_document_lists_every_rule_of_the_normal_form():
    document = DOCUMENT.read_text()
    assert [rule.reason for rule in RULES if rule.reason not in document] == []


def test_what_is_in_normal_form_stays():
    for cases in SAME.values():
        for answer in (part for pair in cases for part in pair):
            assert normalise(normalise(answer)) == normalise(answer)
