"""The faults that hostile testing and field reports found, each with the behaviour that is right.

A test of one carries `@pytest.mark.fault("<name>")`; `test_known_faults.py` holds that each has at
least one, and `scripts/update_robustness` writes docs/robustness.md from this table and from what
the tests counted.
"""

from __future__ import annotations

# area -> name -> what is right.
KNOWN_FAULTS: dict[str, dict[str, str]] = {
    "Files": {
        "status_dir_deletes_directories": (
            "The status directory is a sub-directory of the shim's own below what "
            "ASCEND_PATCHES_STATUS_DIR names; pruning removes only names that the shim writes, by "
            "unlink and rmdir, never through a link."
        ),
        "full_disk_kills_the_server": (
            "Space for counters is reserved before the file is mapped; on a full disk there is no "
            "status file, and vLLM runs."
        ),
        "process_name_is_not_utf8": (
            "A process name that the kernel cut in the middle of a character neither stops "
            "`import vllm` nor the status of another process."
        ),
        "malformed_status_file": (
            "A malformed status file is one line of the report, never a traceback, and hides no "
            "healthy server."
        ),
        "status_of_another_user": (
            "The reader takes regular files of its own user, of a bounded size, and writes no "
            "control characters to a terminal."
        ),
        "many_stale_runs": "10,000 ended runs cost at most 50 ms in `import vllm`.",
        "pid_namespaces_share_a_file": (
            "Processes of two pid namespaces with the same pid and start time have files of their "
            "own."
        ),
        "run_from_the_future": "A run whose clock was ahead does not hide the newest run.",
        "doctor_leaves_a_run": "doctor leaves no run directory behind.",
        "one_ended_run_is_kept": "Ten ended runs are kept: a crashed server's record survives.",
        "status_without_runs": "`status` without runs has one exit status, with --json or without.",
        "no_writable_temporary_directory": (
            "doctor and status say in one sentence that no directory can be written."
        ),
        "helper_process_looks_crashed": (
            "A helper process that ended normally is not shown as a front end that crashed."
        ),
        "relative_status_dir": (
            "A relative ASCEND_PATCHES_STATUS_DIR is refused with a sentence; no directory is made."
        ),
        "full_stderr_changes_exit_status": (
            "A full or broken stderr does not turn exit status 0 into 120."
        ),
    },
    "Start-up": {
        "shim_error_ends_import": (
            "No exception of any type, raised anywhere in the shim's own code, ends Python's start "
            "or the host's import."
        ),
        "strict_is_bypassed": (
            "ASCEND_PATCHES_STRICT holds for deep stacks, interrupts, errors in the shim's own "
            "files, a second import, a cleared environment."
        ),
        "switch_values": (
            "One reader for all switches: 1/true/yes/on and 0/false/no/off in any case; anything "
            "else is an error that names the variable."
        ),
        "submodule_before_decision": (
            "No thread imports a submodule of vLLM before the decision was taken."
        ),
        "lock_held_across_imports": "No lock of the shim is held while the host is imported.",
        "only_exclusions": "`ASCEND_PATCHES=-kv_connector` selects all patches but that one.",
        "unknown_patch_name": (
            "An unknown patch name stops a process that imports vLLM with a sentence that names "
            "the patches, as documented, and no other process."
        ),
        "doctor_and_exit_output": ("Output of another package at exit does not make doctor fail."),
        "doctor_and_skipped_by_name": (
            "doctor ends with 1 where a patch that was asked for by name is not applied."
        ),
        "explain_without_vllm": "`explain` without vLLM says in one sentence that it is missing.",
        "explain_repeats_lines": "`explain` says a sentence once, and is computed once.",
        "warnings_vanish_in_engine": "Warnings of the shim are seen in EngineCore and workers.",
        "verify_json_without_dependency": (
            "`verify --json FILE` writes the file where a dependency is missing."
        ),
        "serve_prints_a_broken_command": "The command that `scripts/serve` prints runs as it is.",
        "serve_hides_the_cause": (
            "A model that vLLM refuses ends `scripts/serve` with the cause and the log's path."
        ),
    },
    "Devices and other packages": {
        "gpu_taken_for_cpu": (
            "A CPU target is armed only where vLLM's own platform is the CPU; what writes through "
            "ctypes refuses tensors of another device first."
        ),
        "npu_found_by_device_files": (
            "The NPU is recognised by the active platform or torch_npu, not by device files."
        ),
        "ray_pythonpath_spelling": (
            "Ray's workers get the shim for every spelling of PYTHONPATH; where they cannot, it is "
            "said."
        ),
        "wrapped_targets_copy_and_pickle": "Wrapped functions copy and pickle by reference.",
        "late_target_reads_applied": "A target that came after layers were built says so.",
        "library_impl_without_wraps": (
            "A wrapped torch.library.Library.impl is no reason to roll back."
        ),
        "left_to_the_host_in_silence": (
            "What a patch leaves to the host in a running server is in its state, with reason and "
            "count."
        ),
        "wheel_overwrites_sitecustomize": (
            "A wheel overwrites no other distribution's file, and pip removes it whole."
        ),
        "older_editable_install": (
            "The .pth of an older editable install still activates the shim after an upgrade."
        ),
    },
    "KV connector": {
        "write_in_flight_is_forgotten": (
            "A job that may still write is never forgotten; when all records are live a new job is "
            "refused."
        ),
        "planning_cost_is_unbounded": (
            "Every number from the network is range-checked before anything is planned; one "
            "message cannot hold the listener."
        ),
        "blocks_given_back_too_early": (
            "Blocks of a writer that may live on (undecodable answers, errors without the shim's "
            "field, another nonce) are quarantined until the writer is known to have ended."
        ),
        "ipv6": "IPv6 addresses work, and an address that cannot be bound is named in the error.",
        "cancel_grows_records": "`cancel` of unknown transfers does not grow memory.",
        "nonsense_address_leaks_sockets": "An address that cannot be used leaks no socket or task.",
        "internal_errors_are_sent_to_peers": (
            "Peers are told sentences; internal errors stay in the log."
        ),
        "ascend_messages_unchecked": (
            "Every number, address and identity that vllm-ascend's connector takes from the "
            "network is range-checked before it is used."
        ),
        "ascend_blocks_given_back_too_early": (
            "vllm-ascend's connector gives a block back only when nobody can still write to it."
        ),
    },
    "Kernels": {
        "rotary_embedding_under_grad": "rotary_embedding refuses tensors that need a gradient.",
        "conv_query_start_loc_out_of_range": (
            "The convolution refuses query_start_loc beyond T and K = 0 with a sentence."
        ),
        "descriptor_ids_out_of_range": "Block ids of 2**63 and more are refused with a sentence.",
        "gdn_slot_out_of_range": (
            "A state slot out of range is refused before any sequence's state is written."
        ),
        "merge_block_id_types": "merge_head_shards_ refuses 1.5 and True as block ids.",
        "has_initial_state_types": (
            "The chunk rule and the convolution agree on the dtypes of has_initial_state."
        ),
    },
}

SENTENCES = {name: text for area in KNOWN_FAULTS.values() for name, text in area.items()}
