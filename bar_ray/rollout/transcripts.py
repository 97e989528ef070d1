"""Rollouts for people: a self-contained page of prompts, completions and rewards."""

from collections.abc import Callable, Sequence
from statistics import fmean

from jinja2 import Environment

from bar_ray.rollout.records import Group

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font: 13px/1.45 monospace }
details { border-top: 1px solid #8884; padding: .4rem 0 }
summary { cursor: pointer }
.prompt { background: #8881; padding: .5rem; border-radius: 4px }
.completion { border-left: 3px solid #c33; padding-left: .7rem; margin: .7rem 0 }
.completion.right { border-color: #2a7 }
.about { color: #888; font-size: 13px }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="about">{{ groups | length }} prompts, {{ num_completions }} completions, mean reward
{{ '%.3f' % reward }}. A prompt without signal has completions of one reward only: nothing is
learned from it.</p>
{% for group in groups %}
<details{{ ' open' if loop.index <= 3 }}>
<summary><b>{{ group.prompt_id }}</b> <span class="about">{{ group.source }}, reward
{{ '%.2f' % mean(group.rewards) }}{{ '' if group.has_signal else ', no signal' }}</span></summary>
<pre class="prompt">{{ read(group.prompt) }}</pre>
{% for c in group.completions %}
<div class="completion{{ ' right' if c.reward == 1 }}">
<span class="about">reward {{ '%.2f' % c.reward }} ({{ c.outcome }}),
{{ c.tokens | length }} tokens, {{ 'cut off' if c.finish == 'length' else 'ended' }}, weights
{% for version, start, end in c.spans %}{{ version }} ({{ end - start }} tokens){{ ', ' if not
loop.last }}{% endfor %}</span>
<pre>{{ read(c.tokens) }}</pre>
</div>
{% endfor %}
</details>
{% endfor %}
</body>
</html>
"""


def page(title: str, groups: Sequence[Group], read: Callable[[list[int]], str]) -> str:
    """HTML of graded groups; `read` turns token ids into text."""
    rewards = [reward for group in groups for reward in group.rewards]
    template = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    return template.render(
        title=title,
        groups=groups,
        read=read,
        mean=fmean,
        num_completions=len(rewards),
        reward=fmean(rewards) if rewards else 0.0,
    )
