"""Bad input that is let through, and folders of strangers that are trusted."""

from planted import Bug, Replacement

F, S, C = "tests/test_fuzz.py::", "tests/test_strangers.py::", "tests/test_cli.py::"
CONFIG, RECORDS = "train/config.py", "train/records.py"
CONFIGURATIONS = f"{F}test_configurations[1]"
OUTPUTS = f"{F}test_unusable_outputs[1]"
NOTHING_IMPORTED = f"{S}test_no_command_imports_what_a_folder_names"

BUGS = (
    Bug(
        20,
        "an object's spelling may be no text",
        CONFIG,
        """    _require(isinstance(value, str), name, _shown(value), "must be text, as on the command line")
""",
        "",
        (CONFIGURATIONS,),
    ),
    Bug(
        20,
        "a file nested without end is a traceback",
        RECORDS,
        """    except RecursionError:
        raise ValueError("nested too deeply") from None""",
        "    finally:\n        pass",
        (CONFIGURATIONS,),
    ),
    Bug(
        20,
        "records of the wrong shape are a traceback",
        "cli/runs.py",
        "    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:",
        "    except OSError as error:",
        (f"{F}test_records_of_a_run[1]",),
    ),
    Bug(
        20,
        "a model that transformers stumbles over is a traceback",
        "models.py",
        "    except Exception as error:  # what a broken folder makes a library raise is anyone's guess",
        "    except OSError as error:",
        (f"{F}test_models[1]",),
    ),
    Bug(
        20,
        "a folder's code is imported to show how it is spelled",
        CONFIG,
        "    if not own_code and names_code(value):",
        "    if False:",
        (NOTHING_IMPORTED,),
    ),
    Bug(
        20,
        "a resume imports whatever a folder names",
        "cli/folder.py",
        "    code = {} if own_code else foreign_code(run)",
        "    code: dict[str, str] = {}",
        (f"{S}test_a_resume_names_the_code_and_the_way_to_allow_it",),
    ),
    Bug(
        20,
        "the reward inside a task of records goes unseen",
        "cli/folder.py",
        '        reward = getattr(getattr(run, name), "reward_name", "")',
        '        reward = ""',
        (f"{S}test_a_resume_names_the_code_and_the_way_to_allow_it",),
    ),
    Bug(
        20,
        "the report calls a model's own function for its tokenizer",
        "report/vocabulary.py",
        "    if not exported.exists() and names_code(run.model):",
        "    if False:",
        (NOTHING_IMPORTED,),
    ),
    Bug(
        20,
        "an adapter's base may be code",
        "foreign.py",
        '    if not isinstance(base, str) or not base or (":" in base and not Path(base).is_dir()):',
        "    if not isinstance(base, str) or not base:",
        (f"{S}test_an_adapter_cannot_name_code_as_its_base",),
    ),
    Bug(
        20,
        "a comparison's page imports its objectives",
        "report/comparison_data.py",
        "        if names_code(name):  # a page is made without running what its folder names\n            continue\n",
        "",
        (f"{S}test_a_comparison_of_a_stranger_is_shown_and_not_resumed",),
    ),
    Bug(
        20,
        "models may bring their own code",
        "models.py",
        "model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, dtype=torch.float32)",
        "model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=True)",
        (f"{S}test_nothing_is_unpickled_or_evaluated",),
    ),
    Bug(
        20,
        "where nothing can be written is a traceback",
        "cli/output.py",
        "    except (OSError, ValueError) as error:",
        "    except TimeoutError as error:",
        (OUTPUTS,),
    ),
    Bug(
        20,
        "whether a command can write is found out once it has computed",
        "cli/output.py",
        "        _try_in(path.parent)\n",
        "",
        (OUTPUTS,),
    ),
    Bug(
        20,
        "a picture may have any ending",
        "cli/output.py",
        "    if endings and path.suffix.lower() not in endings:",
        "    if False:",
        (f"{C}test_bad_input_is_one_line_that_names_it_and_status_2",),
    ),
    Bug(
        20,
        "the folder of a run that never began stays",
        "cli/output.py",
        "            folder.rmdir()",
        "            pass",
        (f"{C}test_a_folder_of_which_nothing_has_come_is_removed",),
    ),
    Bug(
        20,
        "a mistyped run is asked of the hub",
        "model_names.py",
        "    if (written_so or Path(name).is_file()) and not Path(name).is_dir():",
        "    if False:",
        (f"{C}test_a_path_that_is_not_there_is_not_asked_of_the_hub",),
    ),
    Bug(
        20,
        "the hub's library shows every attempt",
        "cli/__init__.py",
        '    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when the hub\'s library is imported\n',
        "",
        (f"{C}test_what_the_hub_says_of_its_attempts_is_not_shown",),
    ),
    Bug(
        20,
        "scores from -1 to 1 have the interval of a share",
        "train/evaluate.py",
        "    low, high = mean_interval(np.array(list(means.values())), most) if bounded else (math.nan, math.nan)",
        "    low, high = mean_interval(np.array(list(means.values())), most)",
        ("tests/test_metrics.py::test_scores_that_leave_0_to_1_have_a_mean_and_no_interval",),
    ),
    Bug(
        20,
        "a mean that is no share is printed as percent",
        "report/step_table.py",
        "    if low is None or high is None or math.isnan(low):",
        "    if low is None or high is None:",
        (f"{C}test_a_mean_of_scores_that_leave_0_to_1_is_no_share",),
    ),
    Bug(
        20,
        "a switch misspelt is taken for its contrary",
        "cli/options.py",
        'found += [flag(f.name), flag(f"no_{f.name}")] if isinstance(default, bool) else [flag(f.name)]',
        "found.append(flag(f.name))",
        (f"{C}test_a_switch_that_turns_off_is_suggested_as_one",),
    ),
    Bug(
        20,
        "the help of a command tells of a run's fields in place of the command",
        "cli/overrides.py",
        "    kind.__doc__ = others.__doc__",
        "    kind.__doc__ = Run.__doc__",
        (f"{C}test_help_says_what_a_command_does_and_gives_an_example",),
    ),
    Bug(
        20,
        "trainings that are done are counted among those to do",
        "cli/compare.py",
        "    todo = [cell for cell in map(read_cell, cells) if not cell.over]",
        "    todo = [cell for cell in map(read_cell, cells) if cell.over]",
        (f"{C}test_how_many_trainings_there_are_is_said_in_the_help_and_before_they_begin",),
    ),
)

REPLACEMENTS = (
    Replacement(
        "a value of a configuration may be of any type",
        "drpo.train.config:_typed",
        lambda right: lambda name, value, kind: value,
        (CONFIGURATIONS,),
    ),
)
