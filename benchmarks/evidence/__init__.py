"""What the ablation, the comparison of heads and the robustness grid share: data, resumable runs, statistics."""
