"""From settings to a trained, scored model.

Settings: train_config (what a run takes), config (command line and YAML, through Hydra), saved_config
A run: setup, loop, engine (DeepSpeed), optimizer, muon, adamw_8bit, micro_batch, sequence_chunks, spikes,
    state, checkpoint; run_folder, metrics, plots, report; interrupt, watchdog, processes, distributed,
    out_of_memory
Models in and out: weights (of a run, a checkpoint or an export), model_folder (the published layout)
Scoring: evaluation, evaluation_text, evaluate_checkpoints, evaluation_results; lm_eval_model
Many runs: multirun (`train.py -m`); sweep, sweep_command, sweep_runner, sweep_forecast, sweep_report;
    rank_kill, multi_gpu_report; launching (commands on free GPUs)
Planning: memory, planning, gpus. Shared: command (of every entry), errors (and exit codes), tables
"""
