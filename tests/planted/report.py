"""Mistakes in a run's page: numbers that are not the run's, data that breaks out, a page that ends a run."""

from planted import Bug

REPORT = "tests/test_report.py::"
PAGE = "tests/test_report_page.py::"
BROWSER = "tests/test_report_browser.py::"
BY_HAND = f"{REPORT}test_what_an_update_saw_by_hand"
OF_UPDATES = f"{REPORT}test_the_weights_of_a_run_are_those_of_its_updates"
STATES = f"{REPORT}test_every_state_of_a_completion"
WHOLE_GROUPS = f"{REPORT}test_of_a_run_that_is_too_large_whole_groups_are_read"
DECIMAL = f"{REPORT}test_a_decimal_is_the_number_to_three_digits_and_codes_are_ordered"
NEIGHBOURS = f"{REPORT}test_neighbouring_decimals_are_one_code_apart"
PACKED = f"{REPORT}test_columns_come_back_as_they_were"
STRICT = f"{REPORT}test_json_of_a_page_is_strict_and_ascii"
COLUMNS = f"{REPORT}test_the_browsers_columns_by_hand"
TEXTS = f"{REPORT}test_texts_are_stored_only_where_the_tokens_do_not_say_them"
PIECES = f"{REPORT}test_pieces_join_to_the_text_with_the_spaces_of_either_kind_of_tokenizer"
BOUNDARIES = f"{REPORT}test_boundaries_are_where_the_weights_say_that_regions_end"
UNREACHED = f"{REPORT}test_a_boundary_that_no_token_reaches_is_said_not_drawn"
BEYOND = f"{REPORT}test_the_histogram_counts_every_token_under_its_sign[0.2]"
CURVES = f"{REPORT}test_every_curve_is_the_records_and_has_a_gap_where_these_have_no_number"
EXTREMES = f"{REPORT}test_a_long_curve_keeps_its_extremes_and_its_gaps"
MARKUP = f"{REPORT}test_no_text_of_a_figure_is_markup"
SCATTER = f"{REPORT}test_the_scatter_is_a_fixed_choice_of_trained_tokens"
SECONDS = f"{REPORT}test_seconds_are_summed_by_phase_and_step"
DIFFERS = f"{REPORT}test_the_configuration_says_what_differs_and_from_what"
TITLE = f"{PAGE}test_the_title_is_escaped"
POLICY = f"{PAGE}test_the_page_lets_run_its_own_scripts_and_asks_for_nothing"
ENDS = f"{PAGE}test_a_script_that_would_end_its_element_is_refused"
WARNED = f"{PAGE}test_a_report_that_cannot_be_written_is_a_warning_and_the_run_is_done"
LOCAL = f"{REPORT}test_a_tokenizer_comes_from_this_machine_or_not_at_all"

BUGS = (
    Bug(
        19,
        "the objective is asked about a step's updates together",
        "report/seen.py",
        'of_update = [i for i in trained if records[i]["update"] == update]',
        'of_update = [i for i in trained if update == records[trained[0]]["update"]]',
        (OF_UPDATES,),
    ),
    Bug(
        19,
        "all completions of an update count as one sequence",
        "report/seen.py",
        "sequence=torch.arange(len(records)).repeat_interleave(counts)",
        "sequence=torch.zeros(int(counts.sum()), dtype=torch.int64)",
        (f"{OF_UPDATES}[objective0]",),
    ),
    Bug(
        19,
        "the ratio is shown in place of the weight",
        "report/seen.py",
        "columns = (ratio(tokens), shift(tokens), weight, tokens.advantage, outside)",
        "columns = (ratio(tokens), shift(tokens), ratio(tokens), tokens.advantage, outside)",
        (BY_HAND,),
    ),
    Bug(
        12,
        "a large run is thinned by completions, not by groups",
        "report/seen.py",
        '_lot(r["step"], r["problem"])',
        "_lot(r[\"step\"], f\"{r['problem']}{r['sample']}\")",
        (WHOLE_GROUPS,),
    ),
    Bug(
        19,
        "999.5 is written as a thousandth of what it is",
        "report/decimals.py",
        "    exponent, digits = exponent + (digits >= 1000), np.where(digits >= 1000, 100, digits)\n",
        "    digits = np.where(digits >= 1000, 100, digits)\n",
        (DECIMAL,),
    ),
    Bug(
        19,
        "digits are cut off instead of rounded",
        "report/decimals.py",
        "np.rint(safe / 10.0 ** (exponent - 2))",
        "np.floor(safe / 10.0 ** (exponent - 2))",
        (DECIMAL, NEIGHBOURS),
    ),
    Bug(
        19,
        "what cannot be shown is shown as 0",
        "report/decimals.py",
        "np.where(size == 0, 0, np.where(size < 1, 1, TOO_LARGE))",
        "0",
        (DECIMAL,),
    ),
    Bug(
        16,
        "the bytes of a number are packed in the machine's order of planes, read in the other",
        "report/payload.py",
        "little.view(np.uint8).reshape(len(little), little.itemsize).T.tobytes()",
        "little.view(np.uint8).reshape(len(little), little.itemsize).T[::-1].tobytes()",
        (PACKED,),
    ),
    Bug(
        20,
        "NaN goes into the page's JSON",
        "report/payload.py",
        "json.dumps(finite(value), allow_nan=False, separators",
        "json.dumps(value, separators",
        (STRICT,),
    ),
    Bug(
        16,
        "a token is looked up by its id instead of its place in the vocabulary",
        "report/browser.py",
        "order[np.searchsorted(ids[order], all_ids)]",
        "np.searchsorted(ids[order], all_ids)",
        (COLUMNS,),
    ),
    Bug(
        19,
        "pi is taken from the mu of all tokens, not of the trained ones",
        "report/browser.py",
        "mu_trained = codes(lambda cs: cs[0].mu)",
        "mu_trained = decimals.encode(_all(rollouts.completions, lambda c: c.mu, np.float64))[: sum("
        "len(c.mu) for c, _ in trained)]",
        (COLUMNS,),
    ),
    Bug(
        16,
        "special tokens are taken for text",
        "report/browser.py",
        'return said == "".join(p.text for p in pieces if not p.special)',
        'return said == "".join(p.text for p in pieces)',
        (f"{TEXTS}[True]",),
    ),
    Bug(
        16,
        "the space before a word is lost",
        "report/vocabulary.py",
        'return f" {text}" if starts_word else text',
        "return text",
        (PIECES,),
    ),
    Bug(
        20,
        "a report fetches a tokenizer from the network",
        "models.py",
        "source = str(_smollm2_folder()) if name == SMOLLM2 else name if alone else _source(name)",
        "source = str(smollm2()) if name == SMOLLM2 else name if alone else _source(name)",
        (LOCAL,),
    ),
    Bug(
        4,
        "PPO's two radii are swapped",
        "objectives/clip.py",
        "return _outside(ratio(tokens), self.low, self.high)",
        "return _outside(ratio(tokens), self.high, self.low)",
        (f"{BOUNDARIES}[0.3-objective0]",),
    ),
    Bug(
        4,
        "a region in the ratio is drawn as one in the shift",
        "objectives/quadratic.py",
        "return shift(tokens, power=1.0).abs() > self.epsilon",
        "return shift(tokens).abs() > self.epsilon",
        (BOUNDARIES,),
    ),
    Bug(
        4,
        "a radius of 12.5 is drawn as if it could be reached",
        "report/distribution.py",
        "enumerate(o for o in regions(objective) if caution(o) is None)",
        "enumerate(regions(objective))",
        (UNREACHED,),
    ),
    Bug(
        19,
        "weights beyond the outermost bins are counted nowhere",
        "report/distribution.py",
        "inside = np.clip(weight, edges[0], edges[-1])",
        "inside = weight",
        (BEYOND,),
    ),
    Bug(
        13,
        "the scatter's choice changes from call to call",
        "report/distribution.py",
        "np.random.default_rng(seed % 2**63)",
        "np.random.default_rng()",
        (SCATTER,),
    ),
    Bug(
        19,
        "a phase that comes twice in a step counts once",
        "report/facts.py",
        'phases[name][at[record["step"]]] += seconds',
        'phases[name][at[record["step"]]] = seconds',
        (SECONDS,),
    ),
    Bug(
        19,
        "the recipe's column shows the library's defaults",
        "report/facts.py",
        '{f"recipe {recipe}": find(recipe)}',
        '{f"recipe {recipe}": Run()}',
        (DIFFERS,),
    ),
    Bug(
        20,
        "the title goes into the page as it is",
        "report/html.py",
        "autoescape=True",
        "autoescape=False",
        (TITLE,),
    ),
    Bug(
        20,
        "plotly reads a name as HTML",
        "report/figures.py",
        'return value.replace("&", "&amp;").replace("<", "&lt;")',
        "return value",
        (MARKUP,),
    ),
    Bug(
        19,
        "a line is drawn across the steps that have no number",
        "report/panels.py",
        "[number(m.get(key)) for m in metrics]",
        "[number(m.get(key)) or 0.0 for m in metrics]",
        (CURVES,),
    ),
    Bug(
        19,
        "a spike between the points of a long curve is lost",
        "report/panels.py",
        "*([min(known)[1], max(known)[1]] if known else [])",
        "*([known[0][1], known[-1][1]] if known else [])",
        (EXTREMES,),
    ),
    Bug(
        20,
        "any inline script may run",
        "report/html.py",
        'f"script-src {allowed}"',
        "\"script-src 'unsafe-inline'\"",
        (POLICY,),
    ),
    Bug(
        20,
        "a script may end its element",
        "report/html.py",
        "    if found:\n        raise",
        "    if not script:\n        raise",
        (ENDS,),
    ),
    Bug(
        20,
        "a report that cannot be written fails a run that is done",
        "cli/output.py",
        '    except Exception as error:\n        log.warning("no %s',
        '    except OSError as error:\n        log.warning("no %s',
        (WARNED,),
    ),
    Bug(
        16,
        "the page shows a token's neighbour's numbers",
        "report/page/rollouts.js",
        "const [at, t] = [this.start[i] + k, this.trainedStart[i] + k];",
        "const [at, t] = [this.start[i] + k, this.trainedStart[i] + Math.max(0, k - 1)];",
        (f"{BROWSER}test_pointing_at_a_token_shows_its_numbers",),
    ),
    Bug(
        20,
        "the page reads a completion as HTML",
        "report/page/rollout_view.js",
        "withMarks(token.text));",
        '[]).appendChild(Object.assign(document.createElement("b"), { innerHTML: token.text })).parentNode;',
        (f"{BROWSER}test_a_script_in_a_completion_is_text",),
    ),
    Bug(
        19,
        "a filter of rewards keeps what has none",
        "report/page/rollout_list.js",
        "return value !== null && (low === null",
        "return (low === null",
        (f"{BROWSER}test_filters_leave_the_right_completions",),
    ),
)
