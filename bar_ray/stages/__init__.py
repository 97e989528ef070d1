"""The stages an expert goes through: language-model training (midtrain, sft) and RLVR."""
