"""What simple methods reach on the same text + label data: always the larger class, and TF-IDF with logistic regression."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def majority(train_labels: Sequence[str], test_labels: Sequence[str]) -> float:
    """Accuracy of always answering the most frequent training label."""
    most = Counter(train_labels).most_common(1)[0][0]
    return sum(label == most for label in test_labels) / len(test_labels)


def tfidf(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> float:
    """Accuracy of logistic regression over TF-IDF of words and word pairs.

    Args:
        train, test: (text, label) pairs.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    # The best of a small search over word pairs, minimum counts and C: a strong baseline, not a straw man.
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2), LogisticRegression(C=5.0, max_iter=1000))
    model.fit([t for t, _ in train], [y for _, y in train])
    return float(model.score([t for t, _ in test], [y for _, y in test]))
