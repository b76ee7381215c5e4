"""Mistakes in 8-bit grids, in the products on them, in how models get and keep them, and in what routers chose."""

from planted import Bug

PRECISION = "tests/test_precision.py::"
ROUTING = "tests/test_routing.py::"
NEAREST = f"{PRECISION}test_values_are_the_nearest_of_the_grid"
HALFWAY = f"{PRECISION}test_halfway_goes_to_the_even_value"
BOUNDED = f"{PRECISION}test_errors_are_bounded"
ROWS = f"{PRECISION}test_rows_do_not_know_of_each_other"
ZEROS = f"{PRECISION}test_a_row_of_zeros_stays_one"
BROKEN = f"{PRECISION}test_what_is_broken_stays_visible"
PRODUCT = f"{PRECISION}test_the_product_is_that_of_the_rounded_operands"
GRADIENTS = f"{PRECISION}test_gradients_are_those_of_the_formula"
AUTOCAST = f"{PRECISION}test_under_autocast_weights_and_their_gradients_stay_in_float32"
TAKING = f"{PRECISION}test_taking_weights_is_being_made_of_them"
ENGINE = f"{PRECISION}test_the_engines_law_is_that_of_the_rounded_weights"
PARTS = f"{PRECISION}test_head_embeddings_norms_and_routers_are_on_no_grid"
GATES = f"{PRECISION}test_gates_that_are_linear_layers_are_on_no_grid"
TRANSPOSED = f"{PRECISION}test_stacked_weights_that_are_stored_the_other_way_round_have_the_same_channels"
LEFT_ALONE = f"{PRECISION}test_inputs_are_left_alone_for_comparisons_and_rounded_again"
SIZE = f"{PRECISION}test_the_copy_is_no_larger_than_one_in_the_compute_dtype"
SAME = f"{PRECISION}test_sampler_and_trainer_compute_the_same"
EXPERTS = f"{PRECISION}test_experts_are_rounded_in_training_with_the_gradient_of_the_rounded_ones"
POLICY = f"{PRECISION}test_a_policys_law_is_its_samplers"
BY_HAND = f"{ROUTING}test_by_hand"
ORDER = f"{ROUTING}test_the_order_of_the_chosen_does_not_count"
AS_TRAINED = f"{ROUTING}test_an_eight_bit_copy_and_the_trainers_autocast_are_seen"
MERGED = f"{ROUTING}test_a_mixtures_adapters_are_merged_under_the_plain_names"

BUGS = (
    Bug(
        14,
        "new weights meet the scales of the old ones",
        "precision.py",
        "        self.scale.copy_(q.scale)\n",
        '        getattr(self, "taken", False) or self.scale.copy_(q.scale)\n        self.taken = True\n',
        (TAKING, f"{ENGINE}[llama-e4m3]"),
    ),
    Bug(
        14,
        "stacked experts are rounded when the engine is made, and copied as they are afterwards",
        "precision.py",
        'takers[f"{module_name}.{field}"] = take',
        'takers[f"{module_name}.{field}"] = parameter.copy_',
        (f"{ENGINE}[qwen3, mixture-e4m3]",),
    ),
    Bug(
        14,
        "training goes on with the experts of the first forward pass",
        "precision.py",
        "        vars(module).pop(name, None)",
        "        pass",
        (f"{SAME}[qwen3, mixture-fp8]",),
    ),
    Bug(
        15,
        "adapters of stacked experts are left out of the merged weights",
        "policy.py",
        "getattr(m, 'parameter_name', 'weight')",
        "'weight'",
        (MERGED,),
    ),
    Bug(
        18,
        "one scale for the whole matrix",
        "precision.py",
        "wide.abs().amax(dim, keepdim=True)",
        "wide.abs().amax(keepdim=True).expand(wide.abs().amax(dim, keepdim=True).shape)",
        (ROWS, NEAREST),
    ),
    Bug(
        18,
        "numbers are cut to the grid, not rounded",
        "precision.py",
        "ratio.round()",
        "ratio.trunc()",
        (f"{NEAREST}[int8]", f"{BOUNDED}[int8]"),
    ),
    Bug(
        18,
        "the scale is that of the other e4m3 format, which ends at 240",
        "precision.py",
        '"e4m3": 448.0}',
        '"e4m3": 240.0}',
        (f"{HALFWAY}[e4m3]",),
    ),
    Bug(
        18,
        "a row of zeros is divided by zero",
        "precision.py",
        ".clamp(min=SMALLEST_SCALE)",
        "",
        (ZEROS,),
    ),
    Bug(
        18,
        "NaN becomes the largest number",
        "precision.py",
        "    wide = x.float()\n",
        "    wide = x.float().nan_to_num()\n",
        (BROKEN,),
    ),
    Bug(
        18,
        "the scales of the inputs are forgotten",
        "precision.py",
        "        y *= x_scale\n",
        "        pass\n",
        (PRODUCT,),
    ),
    Bug(
        18,
        "one scale stands for all output channels",
        "precision.py",
        "y = sums * w.scale.T",
        "y = sums * w.scale.mean()",
        (PRODUCT, f"{ENGINE}[llama-int8]"),
    ),
    Bug(
        18,
        "the bias is left out",
        "precision.py",
        "        y += bias\n",
        "        pass\n",
        (f"{PRODUCT}[True-dtype0-1e-05-int8-None]", f"{ENGINE}[qwen2, biases-int8]"),
    ),
    Bug(
        18,
        "the output head is on the grid too",
        "precision.py",
        "inside = set(model.get_decoder().modules())",
        "inside = set(model.modules())",
        (PARTS,),
    ),
    Bug(
        18,
        "gates are on the grid too",
        "precision.py",
        " and not ROUTER.search(n)",
        "",
        (GATES,),
    ),
    Bug(
        18,
        "experts that are stored transposed get a scale per input channel",
        "precision.py",
        'return -2 if getattr(module, "is_transposed", False) else -1',
        "return -1",
        (TRANSPOSED,),
    ),
    Bug(
        18,
        "grid values are held in float32",
        "precision.py",
        "if fits and has_e4m3_product(weight.device) else dtype",
        "if fits and has_e4m3_product(weight.device) else torch.float32",
        (SIZE, TAKING),
    ),
    Bug(
        18,
        "the gradient of the inputs goes through unscaled weights",
        "precision.py",
        "grad_x = (grad * w_scale.T).to(dtype) @ w.to(dtype)",
        "grad_x = grad @ w.to(dtype)",
        (GRADIENTS, AUTOCAST),
    ),
    Bug(
        18,
        "the gradient of the weights is taken from the inputs before they were rounded",
        "precision.py",
        "ctx.save_for_backward(values, scale, w.values, w.scale)",
        "ctx.save_for_backward(x, None, w.values, w.scale)",
        (f"{GRADIENTS}[e4m3-e4m3]",),
    ),
    Bug(
        18,
        "the trainer's experts are not rounded",
        "precision.py",
        "        stacks.setdefault(module, []).append(field)",
        "        pass",
        (f"{SAME}[qwen3, mixture-int8]", EXPERTS),
    ),
    Bug(
        18,
        "the policy computes in full precision whatever it is told",
        "policy.py",
        "        lower_through(model, precision)",
        "        pass",
        (POLICY,),
    ),
    Bug(
        18,
        "inputs stay unrounded after a comparison",
        "precision.py",
        "            layer.activations = grid\n",
        "            pass\n",
        (LEFT_ALONE,),
    ),
    Bug(
        19,
        "experts are compared in the order in which they were chosen",
        "routing.py",
        ".sort(-1).values.cpu()",
        ".cpu()",
        (ORDER,),
    ),
    Bug(
        19,
        "routing is compared at the tokens, not where they are predicted",
        "routing.py",
        "len(c.prompt_ids) - 1 : -1]",
        "len(c.prompt_ids) :]",
        (BY_HAND,),
    ),
    Bug(
        19,
        "routing is compared in float32 whatever the trainer computes in",
        "routing.py",
        "enabled=dtype != torch.float32",
        "enabled=False",
        (AS_TRAINED,),
    ),
    Bug(
        19,
        "the gap of tokens that are routed alike is that of the others",
        "routing.py",
        "_mean(gap[~anywhere])",
        "_mean(gap[anywhere])",
        (BY_HAND,),
    ),
)
