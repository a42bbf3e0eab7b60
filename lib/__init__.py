"""What the notebooks explain: answers, noise, rewards, theory, statistics, figures.

Nothing here knows how runs are made, stored or scheduled: that is `runner`.
"""
