"""Bad input that is let through, and folders of strangers that are trusted."""

from planted import Bug

F, S, C = "tests/test_fuzz.py::", "tests/test_strangers.py::", "tests/test_cli.py::"
CONFIG, LOG = "train/config.py", "train/log.py"
CONFIGURATIONS = f"{F}test_configurations[1]"
OUTPUTS = f"{F}test_unusable_outputs[1]"
NOTHING_IMPORTED = f"{S}test_no_command_imports_what_a_folder_names"

BUGS = (
    Bug(
        20,
        "a configuration's whole numbers may be anything that compares",
        CONFIG,
        """    _require(number, name, _shown(value), "must be a whole number" if kind is int else "must be a number")
""",
        "",
        (CONFIGURATIONS,),
    ),
    Bug(
        20,
        "a switch may be any value",
        CONFIG,
        "        _require(isinstance(value, kind), name, _shown(value), rule)\n",
        "",
        (CONFIGURATIONS,),
    ),
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
        LOG,
        """    except RecursionError:
        raise ValueError("nested too deeply") from None""",
        "    finally:\n        pass",
        (CONFIGURATIONS,),
    ),
    Bug(
        20,
        "records of the wrong shape are a traceback",
        "cli/folder.py",
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
        "    if not own_code and is_foreign_code(value):",
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
        "    if not exported.exists() and is_foreign_code(run.model):",
        "    if False:",
        (NOTHING_IMPORTED,),
    ),
    Bug(
        20,
        "any name below drpo counts as ours",
        CONFIG,
        r'_OWN = re.compile(r"drpo\.lab\.tail:\w+(\(.*\))?")',
        r'_OWN = re.compile(r"drpo\..*")',
        (f"{S}test_what_the_stability_benchmark_names_is_ours",),
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
        "a configuration steers the terminal",
        "report/watch.py",
        """Text(printable(f"{config['name']}: {config['model']} learns with {config['objective']}, "), style="bold")""",
        """Text(f"{config['name']}: {config['model']} learns with {config['objective']}, ", style="bold")""",
        (f"{S}test_what_steers_a_terminal_is_not_printed",),
    ),
    Bug(
        20,
        "models may bring their own code",
        "models.py",
        "model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)",
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
        "            _try_in(path.parent)\n            return",
        "            return",
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
)
