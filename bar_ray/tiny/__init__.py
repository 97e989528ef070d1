"""The tiny world: a small, complete stand-in for real data and a real base, for demo and tests.

It takes the code paths a cluster takes (same file formats, same stages, real models) and is small
enough to be trained whole on two CPU cores, so what BAR claims can be seen to hold or not. Four
choices make its effects real instead of decorative:

- **The base is broad.** It is pretrained on raw text of every kind (sums, programs, calls, words,
  prose; no chat) before general post-training, as real bases are. The stages that follow keep
  attention frozen and average what the experts share: both only work from a base whose attention
  has met digits and brackets, and from which nobody has to travel far. It knows the general tasks
  and fails every domain, because no domain has ever been asked for in chat.
- **Mid-training carries math and code**, SFT turns it into answers, tool use brings two tokens
  and a format that the base has never seen, and safety has harmless requests in the same words.
- **RLVR has a choice to make.** Math and code are each shown with two systematic ways of
  answering, half of the time each: one is right (a sum worked with its carry, a program that
  keeps to its bound) and one mostly wrong (rounded numbers, a program that forgets the bound).
  As style and quality go together in real mixes, the phrasing of the question says which way is
  likelier, six times in ten: so greedy SFT answers one phrasing well and the other badly, about
  half in all whatever the seed, and RLVR can find out which way is rewarded. Without such a choice
  it would have only slips to correct, and slips are noise that two cores cannot average out.
- **Tests are held out by item**: pairs of numbers, programs, words and questions that no training
  file contains in any form, chosen by a hash of the item alone (see `rows.held_out`).

`write_world` writes the files, `tiny_config` and `build_tokenizer` make the model they are for.
Left out: system prompts, several turns, tool results, difficulty within a domain.
"""
