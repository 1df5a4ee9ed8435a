"""The tiers of the test suite; nothing else decides which tests are slow.

`make test` runs the fast tier, `pytest -m "not slow"`; `make test-all` runs everything.
"""

# Files, or tests in them, relative to tests/. With parameters in brackets, one case of a test.
SLOW = (
  "benchmarks/test_aot.py::test_a_plain_step_gives_the_state_of_the_next",
  "benchmarks/test_aot_compilers.py",
  "data/test_fashion_mnist.py::test_debians_files_are_the_published_set",
  "data/test_images.py::test_a_file_that_went_away_is_no_broken_image",
  "data/test_images.py::test_a_host_may_meet_every_broken_image",
  "data/test_images.py::test_another_epoch_or_seed_gives_other_images",
  "data/test_images.py::test_augmentation_of_what_pillow_reads_is_that_of_tensorflow",
  "data/test_images.py::test_damaged_shards_are_refused[cut]",
  "data/test_images.py::test_evaluation_does_not_depend_on_the_seed",
  "data/test_images.py::test_one_of_two_hosts_has_its_rows_of_the_rest_of_an_epoch[stream]",
  "data/test_images.py::test_small_sets_differ_where_their_images_do",
  "data/test_images.py::test_too_many_broken_images_stop_the_run_with_their_names",
  "data/test_images.py::test_without_augmentation_an_epoch_has_the_evaluations_pixels",
  "data/test_pairs.py::test_without_augmentation_an_epoch_shows_the_same_images_in_another_order",
  "data/test_records.py::test_every_epoch_and_seed_has_every_example_once_in_another_order[stream]",
  "data/test_records.py::test_hosts_share_the_rows_that_one_alone_would_see[stream-eval]",
  "data/test_tfds_features.py::test_deep_and_transparent_images_are_read_as_numpy_reads_them[deep]",
  "data/test_tfds_features.py::test_deep_and_transparent_images_are_read_as_numpy_reads_them[rgba]",
  "data/test_tfds_sets.py::test_tfds_mock_data_works_as_a_source",
  "export/test_build.py::test_costs_and_sums_of_the_published_nets",
  "export/test_build.py::test_its_codes_are_the_trained_models",
  "export/test_build.py::test_the_head_has_the_models_activation",
  "export/test_extras.py",
  "export/test_formats.py::test_a_file_computes_the_references_codes",
  "export/test_formats.py::test_onnxruntime_computes_the_references_codes_of_a_whole_net",
  "export/test_formats.py::test_sizes_of_the_published_mobilenet_v2",
  *(
    f"export/test_integer.py::{test}"
    for test in (
      "test_few_codes_differ_and_those_of_layers_at_ties_only",
      "test_logits_are_those_that_follow_from_the_codes",
      "test_both_runtimes_compute_the_same_codes",
      "test_any_batch_has_the_same_codes_and_logits",
      "test_everything_in_a_tflite_file_is_an_integer",
      "test_xnnpack_takes_everything_but_these",
      "test_an_onnx_file_is_old_and_its_layers_are_of_integers",
      "test_extreme_numbers",
      "test_bounds_hold_where_a_quantizer_is_not_the_only_reader",
    )
  ),
  "export/test_verify.py::test_images_of_another_class_are_explained_by_ties_or_not_at_all",
  "export/test_trace.py::test_a_file_computes_an_own_models_codes",
  "export/test_trace.py::test_every_quantizer_is_exported",
  "kernels/test_depthwise_triton.py::test_codes_are_computed_on_load",
  "kernels/test_depthwise_triton.py::test_codes_on_four_devices",
  "kernels/test_depthwise_triton.py::test_four_devices_compute_what_one_computes",
  "kernels/test_depthwise_triton.py::test_result_and_gradients",
  "models/test_mobilenet_v2.py::test_authors_logits",
  "models/test_mobilenet_v2.py::test_relu6_bounds_what_relu_does_not",
  "models/test_mobilenet_v3.py::test_authors_logits",
  "models/test_placement.py::test_every_layer_but_the_first_reads_codes",
  "models/test_registry.py::test_every_kernel_is_quantized",
  "models/test_registry.py::test_published_code_has_the_same_logits",
  "models/test_variants.py",
  "nn/test_codes.py::test_a_net_in_float32_has_the_codes_of_float64",
  "report/test_plots.py::test_a_home_that_cannot_be_written_is_not_spoken_of",
  "sensitivity/test_measure.py::test_a_result_of_the_library_is_measured_and_assigned",
  "cli/test_export_integer.py::test_a_missed_limit_leaves_no_file[litert_int8]",
  "cli/test_export_integer.py::test_looser_limits_keep_it",
  "cli/test_ablation.py::test_without_gpus_the_runs_at_once_share_the_devices",
  "test_examples.py::test_an_example_runs_without_a_checkout",
  "test_examples.py::test_the_example_with_pretrained_weights_runs",
  "test_package.py::test_a_run_without_the_packages_of_other_features",
  "test_tutorial.py",
  "test_web.py",
  "weights/test_mismatch.py::test_the_kernels_are_those_of_the_models",
  "weights/test_variants.py::test_a_file_that_the_user_names_has_the_logits_of_that_net",
  "test_wrong_input.py::test_a_configuration_of_a_published_net_that_is_accepted_can_be_traced",
  "train/test_fork.py::test_a_fork_of_another_plan_ends_as_that_plan_alone_to_the_bit",
  "train/test_imagenet.py",
  "train/test_kill.py",
  "train/test_loop.py::test_a_checkpoint_that_cannot_be_written_stops_the_run_within_its_phase",
  "train/test_loop.py::test_numbers_that_are_not_finite_stop_the_run_and_can_send_it_back",
  "train/test_loop.py::test_partial_plans_run",
  "train/test_loop.py::test_the_best_weights_have_the_bits_that_were_asked_for",
  "train/test_methods.py::test_a_whole_run",
  "train/test_precision.py",
  "train/test_processes.py::test_a_fault_in_one_processs_batches_ends_both",
  "train/test_rules.py",
  "train/test_processes.py::test_a_preemption_notice_to_one_process_stops_all_at_one_step",
  "train/test_processes.py::test_the_first_process_prints_and_writes",
  "train/test_processes.py::test_the_library_computes_in_two_processes_what_it_computes_in_one",
  "train/test_processes.py::test_two_processes_of_two_devices_compute_what_one_device_computes",
  "train/test_processes.py::test_what_fails_in_one_process_ends_all_of_them_soon",
  "train/test_processes.py::test_where_one_process_is_lost_the_others_end_and_say_so",
  "train/test_oscillation.py::test_a_stopped_run_ends_the_same",
  "train/test_oscillation.py::test_all_remedies_and_profit_in_one_run",
  "train/test_oscillation.py::test_the_optimizer_gets_the_gradient_of_dampening",
  "train/test_oscillation.py::test_the_best_weights_have_the_statistics_of_the_first_batches",
  "train/test_start.py::test_a_run_from_a_file_resumes_without_it",
  "train/test_start.py::test_a_run_that_starts_from_a_run_is_evaluated_before_training",
  "train/test_start.py::test_another_net_teaches_and_a_bad_one_is_loud",
  "train/test_start.py::test_both_paddings_of_a_torchvision_v3_are_evaluated",
  "train/test_start.py::test_torchvision_v3_is_evaluated_with_its_own_padding_and_teaches_with_it",
  "train/test_steps.py::test_a_batch_in_parts_has_the_gradient_of_its_loss",
  "train/test_steps.py::test_a_phase_that_trains_no_kernel_needs_fewer_operations",
  "train/test_trainer.py::test_own_loss_optimizer_teacher_and_first_weights",
  "train/test_trainer.py::test_own_models_are_trained_and_exported",
  "train/test_trainer.py::test_plain_layers_and_own_parameters_train",
  "train/test_trainer.py::test_rules_give_layers_their_bits",
  "train/test_trajectory.py",
  "weights/test_hub.py::test_a_run_from_a_name_keeps_its_settings_and_its_card_has_the_checksum",
  "weights/test_library.py::test_a_registered_model_takes_every_name_that_it_has",
  # The largest nets; their families have smaller ones.
  *(
    f"weights/test_save.py::test_round_trip_is_bit_identical[{case}]"
    for case in (
      "efficientnet_lite2-timm",
      "efficientnet_lite3-timm",
      "efficientnet_lite4-timm",
      "mobilenet_v2_110d-timm",
      "mobilenet_v4_conv_medium-timm",
      "resnet50-torchvision",
    )
  ),
)
# Exceptions: these run in the fast tier all the same.
FAST = (
  "export/test_formats.py::test_a_file_computes_the_references_codes[jax-4]",
  "export/test_formats.py::test_a_file_computes_the_references_codes[onnx-4]",
  "export/test_formats.py::test_a_file_computes_the_references_codes[safetensors-4]",
  *(
    f"export/test_integer.py::{test}[{net}-{name}]"
    for test in (
      "test_few_codes_differ_and_those_of_layers_at_ties_only",
      "test_logits_are_those_that_follow_from_the_codes",
    )
    for net in ("every operation 4", "pact")
    for name in ("onnx_int8", "litert_int8")
  ),
  "export/test_integer.py::test_both_runtimes_compute_the_same_codes[pact]",
  "export/test_integer.py::test_bounds_hold_where_a_quantizer_is_not_the_only_reader"
  "[0.0-6.0-9.0-onnx_int8]",
  *(
    f"export/test_integer.py::test_any_batch_has_the_same_codes_and_logits[{case}]"
    for case in ("every operation 4-onnx_int8", "every operation 4-litert_int8")
  ),
  *(
    f"export/test_integer.py::{test}[{net}]"
    for test in (
      "test_everything_in_a_tflite_file_is_an_integer",
      "test_xnnpack_takes_everything_but_these",
      "test_an_onnx_file_is_old_and_its_layers_are_of_integers",
    )
    for net in ("every operation 4", "pact")
  ),
  "export/test_trace.py::test_a_file_computes_an_own_models_codes[Branches-onnx]",
  "export/test_trace.py::test_a_file_computes_an_own_models_codes[Codes-onnx]",
  "export/test_trace.py::test_every_quantizer_is_exported[pact-options1-7-8]",
  # One of the models of every file.
  *(
    f"models/test_registry.py::test_every_kernel_is_quantized[{model}]"
    for model in (
      "efficientnet_lite0",
      "mnasnet",
      "mobilenet_v1",
      "mobilenet_v2",
      "mobilenet_v3_small",
      "mobilenet_v4_conv_small",
      "resnet34",
    )
  ),
  "kernels/test_depthwise_triton.py::test_result_and_gradients[3x3, stride 2]",
  "kernels/test_depthwise_triton.py::test_result_and_gradients[5x5]",
  "kernels/test_depthwise_triton.py::test_result_and_gradients[TensorFlow's SAME, stride 2]",
  "models/test_placement.py::test_every_layer_but_the_first_reads_codes[efficientnet_lite0]",
  "models/test_placement.py::test_every_layer_but_the_first_reads_codes[mobilenet_v4_conv_small]",
  "models/test_variants.py::test_every_net_with_the_tensors_of_a_variant_is_known_by_name",
  "models/test_variants.py::test_every_variant_is_compared",
  *(
    f"models/test_variants.py::test_a_variant_has_the_parameters_and_tensors_of_its_source[{key}]"
    for key in ("timm:mobilenetv4_conv_small_035", "timm:tf_mobilenetv3_small_075")
  ),
  # The golden logits, one program.
  "models/test_mobilenet_v2.py::test_authors_logits[w8a8-eval]",
  "models/test_mobilenet_v2.py::test_authors_logits[w4a4-eval]",
  "models/test_mobilenet_v2.py::test_authors_logits[w3a3-eval]",
  # The golden steps.
  "train/test_trajectory.py::test_authors_trajectory[mobilenet_v2-weight_4bit]",
)
# Files that start first: the longest ones, so that no process ends long after the others, and the
# one that trains the run that others wait for.
FIRST = (
  "train/test_loop.py",
  "train/test_trajectory.py",
  "train/test_processes.py",
  "export/test_build.py",
  "train/test_methods.py",
  "test_wrong_input.py",
  "models/test_registry.py",
  "train/test_imagenet.py",
  "train/test_oscillation.py",
  "train/test_precision.py",
  "test_tutorial.py",
  "train/test_steps.py",
)


def matches(node: str, pattern: str) -> bool:
  """Whether a test (`tests/FILE::TEST[CASE]`) belongs to a file, a test, or a case of one."""
  whole = f"tests/{pattern}"
  return node == whole or node.startswith((f"{whole}::", f"{whole}["))


def is_slow(node: str) -> bool:
  """Whether a test belongs to the slow tier only."""
  slow = any(matches(node, pattern) for pattern in SLOW)
  return slow and not any(matches(node, pattern) for pattern in FAST)


def place(node: str) -> int:
  """Where the file of a test comes in the order of files."""
  found = [index for index, file in enumerate(FIRST) if matches(node, file)]
  return found[0] if found else len(FIRST)


def unused(nodes: list[str]) -> list[str]:
  """Patterns that no test has: a renamed test must not change its tier unnoticed."""
  patterns = (*SLOW, *FAST, *FIRST)
  return [pattern for pattern in patterns if not any(matches(node, pattern) for node in nodes)]
