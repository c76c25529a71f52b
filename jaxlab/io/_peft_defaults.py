"""What PEFT 0.21.2 takes where `adapter_config.json` says nothing, by type.

A field beyond these is of another version, or of a type that is not known.
"""

from typing import Any

SAID: dict[str, Any] = {
    "task_type": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
}
"""Fields of every type that say what the adapter is for; they change no number."""

_NAMED: dict[str, Any] = {"target_modules": None, "modules_to_save": None}
_EXCLUDED: dict[str, Any] = {"exclude_modules": None}
_LAYERED: dict[str, Any] = {"layers_to_transform": None, "layers_pattern": None}
_PLACED = _NAMED | _EXCLUDED | _LAYERED
# fmt: off
_LORA: dict[str, Any] = _PLACED | {
    "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "fan_in_fan_out": False,
    "bias": "none", "use_rslora": False, "init_lora_weights": True, "rank_pattern": {},
    "alpha_pattern": {}, "megatron_config": None, "megatron_core": "megatron.core",
    "trainable_token_indices": None, "loftq_config": {}, "eva_config": None,
    "corda_config": None, "lora_ga_config": None, "use_dora": False,
    "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False,
    "qalora_group_size": 16, "monteclora_config": None, "layer_replication": None,
    "lora_bias": False, "target_parameters": None, "use_bdlora": None,
    "arrow_config": None, "kasa_config": None, "ensure_weight_tying": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "ADALORA": _LORA | {
        "rank_pattern": None, "target_r": 8, "init_r": 12, "tinit": 0, "tfinal": 0,
        "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5,
        "total_step": None,
    },
    "BOFT": _PLACED | {
        "boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1,
        "boft_dropout": 0.0, "fan_in_fan_out": False, "bias": "none",
        "init_weights": True,
    },
    "C3A": _NAMED | _LAYERED | {
        "block_size": 256, "bias": "none", "block_size_pattern": {},
        "init_weights": "xavier_uniform",
    },
    "DELORA": _PLACED | {
        "r": 8, "delora_lambda": 15, "module_dropout": 0.0, "bias": "none",
        "init_weights": True, "rank_pattern": {}, "lambda_pattern": {},
    },
    "FOURIERFT": _PLACED | {
        "n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777,
        "fan_in_fan_out": False, "bias": "none", "n_frequency_pattern": {},
        "init_weights": False,
    },
    "GRALORA": _NAMED | _LAYERED | {
        "r": 32, "hybrid_r": 0, "alpha": 64, "gralora_dropout": 0.0, "gralora_k": 2,
        "fan_in_fan_out": False, "bias": "none", "init_weights": True,
    },
    "HIRA": _PLACED | {
        "r": 32, "hira_dropout": 0.0, "fan_in_fan_out": False, "init_weights": True,
        "rank_pattern": {},
    },
    "HRA": _PLACED | {"r": 8, "apply_GS": False, "init_weights": True, "bias": "none"},
    "IA3": _NAMED | _EXCLUDED | {
        "feedforward_modules": None, "fan_in_fan_out": False, "init_ia3_weights": True,
    },
    "LN_TUNING": _NAMED | _EXCLUDED,
    "LOHA": _PLACED | {
        "rank_pattern": {}, "alpha_pattern": {}, "r": 8, "alpha": 8,
        "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False,
        "init_weights": True,
    },
    "LOKR": _PLACED | {
        "rank_pattern": {}, "alpha_pattern": {}, "r": 8, "alpha": 8,
        "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False,
        "decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False,
        "init_weights": True,
    },
    "LORA": _LORA,
    "MISS": _PLACED | {
        "r": 64, "miss_dropout": 0.0, "mini_r": 1, "init_weights": True, "bias": "none",
    },
    "OFT": _PLACED | {
        "r": 0, "oft_block_size": 32, "module_dropout": 0.0, "fan_in_fan_out": False,
        "bias": "none", "init_weights": True, "coft": False, "eps": 6e-05,
        "block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5,
    },
    "OSF": _NAMED | {
        "effective_rank": None, "rank_pattern": None, "init_weights": True,
        "target_svd_config": None,
    },
    "PSOFT": _PLACED | {
        "r": 32, "psoft_alpha": 32, "psoft_dropout": 0.0, "fan_in_fan_out": False,
        "ab_svd_init": "psoft_init", "psoft_svd": "full", "psoft_svd_lowrank_niter": 10,
        "random_seed": 0, "psoft_orth": True, "psoft_mag_b": True, "psoft_mag_a": True,
        "use_cayley_neumann": False, "num_cayley_neumann_terms": 5,
        "cayley_neumann_eps": None, "init_weights": True,
    },
    "RANDLORA": _NAMED | _LAYERED | {
        "r": 32, "projection_prng_key": 0, "save_projection": True, "sparse": False,
        "very_sparse": False, "randlora_dropout": 0.0, "fan_in_fan_out": False,
        "randlora_alpha": 640, "bias": "none", "init_weights": True,
    },
    "ROAD": _NAMED | {"variant": "road_1", "group_size": 64, "init_weights": True},
    "SHIRA": _NAMED | {
        "r": 32, "mask_type": "random", "random_seed": None, "fan_in_fan_out": False,
        "init_weights": True,
    },
    "TINYLORA": _NAMED | _LAYERED | {
        "r": 2, "u": 64, "weight_tying": 0.0, "projection_seed": 42,
        "save_projection": True, "init_v_bound": 0.02, "tinylora_dropout": 0.0,
        "fan_in_fan_out": False, "bias": "none", "init_weights": True,
    },
    "UNILORA": _NAMED | _LAYERED | {
        "r": 4, "proj_seed": 42, "theta_d_length": 256, "unilora_dropout": 0.0,
        "fan_in_fan_out": False, "bias": "none", "init_theta_d_bound": 0.02,
        "init_weights": True, "save_indices": False,
    },
    "VBLORA": _PLACED | {
        "r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2,
        "save_only_topk_weights": False, "vblora_dropout": 0.0, "fan_in_fan_out": False,
        "bias": "none", "init_vector_bank_bound": 0.02, "init_logits_std": 0.1,
    },
    "VERA": _NAMED | _LAYERED | {
        "r": 256, "projection_prng_key": 0, "save_projection": True,
        "vera_dropout": 0.0, "d_initial": 0.1, "fan_in_fan_out": False, "bias": "none",
        "init_weights": True,
    },
    "WAVEFT": _PLACED | {
        "n_frequency": 2592, "scaling": 25.0, "wavelet_family": "db1", "use_idwt": True,
        "random_loc_seed": 777, "fan_in_fan_out": False, "bias": "none",
        "n_frequency_pattern": {}, "proportional_parameters": False,
        "init_weights": True,
    },
}
# fmt: on
