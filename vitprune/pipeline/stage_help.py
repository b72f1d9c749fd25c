"""Names of the pipeline's stages in order, with one line of help each; plain data, so that it is read without torch."""

STAGE_HELP = {
    "dataset": "Read and hash every image, and assign it to the train or the eval split.",
    "dense": "Create the dense model: random, pretrained or from a checkpoint; train it if params.yaml says so.",
    "calibrate": "Draw the calibration set from the train split.",
    "score": "Compute the importance of every prunable unit of the dense model.",
    "mask": "Select the masks of the first pruning cycle from the importance scores.",
    "prune": "Prune cycle by cycle, and fine-tune after each cycle.",
    "distill": "Fine-tune the pruned model with the dense model as teacher.",
    "evaluate": "Measure accuracy, MACs and latency of the dense and the pruned model.",
    "export": "Write the pruned model as a timm directory with a model card, and as ONNX.",
    "report": "Write the HTML report from the results of all stages.",
}
