"""From settings to a trained, scored model.

A run: config (settings), setup, loop, engine (DeepSpeed), optimizer, muon, adamw_8bit, sequence_chunks,
    spikes, state, checkpoint; run_folder, metrics, plots, report; interrupt, watchdog, processes, distributed
Models in and out: weights (of a run, a checkpoint or an export), model_folder (the published layout)
Scoring: evaluation, evaluation_text, evaluate_checkpoints, evaluation_results; lm_eval_model
Many runs: multirun (`train.py -m`); sweep, sweep_command, sweep_runner, sweep_forecast, sweep_report;
    rank_kill, multi_gpu_report; launching (commands on free GPUs)
Planning: memory, gpus. Shared: command (of every entry), errors (and exit codes), tables
"""
