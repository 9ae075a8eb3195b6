"""Run an exported cascade on batches, with numpy and onnxruntime alone; this file may be copied anywhere.

Example:
    from run_cascade import Cascade

    log_probs, label, exit_stage = Cascade("exported")(images, "default")
"""

import json
from pathlib import Path

import numpy as np

STATE = ("log_sum", "weight_sum", "previous_label")


class Cascade:
    """The stage models of a folder.

    A call takes images (N, C, H, W), uint8 or float32 as exported, and the name of an operating point or a
    list of thresholds. It returns log-probabilities (N, classes), labels (N,) and exits (N,); a row that is
    invalid at the last exit has NaN and label −1.
    """

    def __init__(self, directory, **session_options):  # type: ignore[no-untyped-def]
        from onnxruntime import InferenceSession

        first = InferenceSession(Path(directory, "stage-0.onnx"), **session_options)
        self.stored = json.loads(first.get_modelmeta().custom_metadata_map["fastcascade"])
        later = [Path(directory, f"stage-{k}.onnx") for k in range(1, len(self.stored["exit_macs"]))]
        self.stages = [first, *(InferenceSession(path, **session_options) for path in later)]

    def __call__(self, images, operating_point="default"):  # type: ignore[no-untyped-def]
        by_name = isinstance(operating_point, str)
        thresholds = self.stored["thresholds"][operating_point] if by_name else operating_point
        n, classes = len(images), self.stages[0].get_outputs()[0].shape[1]
        log_probs = np.full((n, classes), np.nan, np.float32)
        label, exit_stage = np.full(n, -1), np.full(n, -1)
        state = [np.full((n, classes), -np.inf, np.float32), np.zeros((n, 1), np.float32), np.full(n, -1)]
        active, features = np.arange(n), None
        for k, (stage, threshold) in enumerate(zip(self.stages, [*thresholds, None], strict=True)):
            inputs = {"input": images[active] if features is None else features}
            inputs |= dict(zip(STATE, state, strict=True))
            names = [output.name for output in stage.get_outputs()]
            out = dict(zip(names, stage.run(names, inputs), strict=True))
            last = threshold is None
            stop = np.full(len(active), True) if last else out["score"] >= float(threshold)  # NaN goes on
            rows = active[stop]
            log_probs[rows], label[rows], exit_stage[rows] = out["log_probs"][stop], out["label"][stop], k
            active = active[~stop]
            if not len(active):
                break
            state = [out[f"next_{name}"][~stop] for name in STATE]
            features = out["features"][~stop] if "features" in out else None
        return log_probs, label, exit_stage
