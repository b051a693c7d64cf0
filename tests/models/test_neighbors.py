"""The estimators against scikit-learn's checks and its own neighbors."""

import numpy as np
import pytest
from sklearn import neighbors as theirs
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from models import neighbors as ours

ESTIMATORS = ("NearestNeighbors", "KNeighborsClassifier", "KNeighborsRegressor")


@parametrize_with_checks([getattr(ours, name)() for name in ESTIMATORS])
def test_scikit_learn_accepts_them(estimator, check):
    check(estimator)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(300, 6)), rng.normal(size=(40, 6))


@pytest.mark.parametrize("metric", ours.METRICS)
def test_neighbors_are_those_of_scikit_learn(metric, data):
    keys, queries = data
    mine = ours.NearestNeighbors(7, metric=metric).fit(keys)
    other = theirs.NearestNeighbors(n_neighbors=7, metric=metric, algorithm="brute").fit(keys)
    for rows in (queries, None):
        for found, expected in zip(mine.kneighbors(rows), other.kneighbors(rows), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-9)
        radius = 1.5 if metric == "euclidean" else 0.3
        far, number = mine.radius_neighbors(rows, radius)
        expected = other.radius_neighbors(rows, radius, sort_results=rows is not None)[1]
        assert [set(row) for row in number] == [set(row) for row in expected]
        assert all((np.diff(row) >= 0).all() for row in far)


def test_a_radius_is_inclusive_and_may_hold_everything():
    model = ours.NearestNeighbors().fit(np.arange(100.0)[:, None])
    far, number = model.radius_neighbors([[0.0], [50.0]], radius=3.0)
    assert number[0].tolist() == [0, 1, 2, 3]
    assert far[1].tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert len(model.radius_neighbors([[0.0]], radius=1000, return_distance=False)[0]) == 100


@pytest.mark.parametrize("weights", ["uniform", "distance", lambda d: np.exp(-d)])
def test_votes_and_means_are_those_of_scikit_learn(weights, data):
    keys, queries = data
    queries = np.concatenate([queries, keys[:5]])  # at distance 0 as well
    rng = np.random.default_rng(1)
    names = np.array(["c", "a", "b"])[rng.integers(0, 3, len(keys))]
    targets = rng.normal(size=(len(keys), 2))
    mine = ours.KNeighborsClassifier(4, weights=weights).fit(keys, names)
    other = theirs.KNeighborsClassifier(4, weights=weights, algorithm="brute").fit(keys, names)
    np.testing.assert_allclose(mine.predict_proba(queries), other.predict_proba(queries))
    assert (mine.predict(queries) == other.predict(queries)).all()
    for y in (targets, targets[:, 0]):
        mine = ours.KNeighborsRegressor(4, weights=weights).fit(keys, y)
        other = theirs.KNeighborsRegressor(4, weights=weights, algorithm="brute").fit(keys, y)
        np.testing.assert_allclose(mine.predict(queries), other.predict(queries))


def test_keys_come_and_go_without_a_new_fit(data):
    keys, queries = data
    rng = np.random.default_rng(2)
    model = ours.NearestNeighbors(5).fit(keys[:100])
    there = list(range(100))
    for start, stop in ((100, 103), (103, 180), (180, 300)):
        assert model.add(keys[start:stop]).tolist() == list(range(start, stop))
        there += range(start, stop)
        gone = rng.choice(there, 40, replace=False)
        model.remove(gone)
        there = [name for name in there if name not in set(gone)]
        found = model.kneighbors(queries)
        expected = theirs.NearestNeighbors(n_neighbors=5).fit(keys[there]).kneighbors(queries)
        np.testing.assert_allclose(found[0], expected[0])
        assert (found[1] == np.array(there)[expected[1]]).all()
    allowed = np.zeros(300, dtype=bool)
    allowed[there[::3]] = True
    expected = theirs.NearestNeighbors(n_neighbors=5).fit(keys[there[::3]])
    expected = np.array(there[::3])[expected.kneighbors(queries)[1]]
    for some in (allowed, np.array(there[::3])):
        assert (model.kneighbors(queries, return_distance=False, allowed=some) == expected).all()
    with pytest.raises(ValueError, match="is not there"):
        model.remove([int(gone[0])])
    with pytest.raises(ValueError, match="all"):
        model.remove(there)


def test_samples_with_targets_come_and_go(data):
    keys, queries = data
    names = np.arange(300) % 3
    model = ours.KNeighborsClassifier(3).fit(keys[:200], names[:200])
    model.add(keys[200:], names[200:] + 5)
    both = np.concatenate([names[:200], names[200:] + 5])
    expected = theirs.KNeighborsClassifier(3).fit(keys, both)
    assert (model.predict(queries) == expected.predict(queries)).all()
    model = ours.KNeighborsRegressor(3).fit(keys[:200], names[:200])
    model.add(keys[200:], names[200:])
    model.remove(range(50))
    expected = theirs.KNeighborsRegressor(3).fit(keys[50:], names[50:])
    np.testing.assert_allclose(model.predict(queries), expected.predict(queries))


def test_a_pipeline_and_a_grid():
    X, y = load_digits(return_X_y=True)
    X, y = X[:400], y[:400]
    mine, other = (
        GridSearchCV(
            make_pipeline(StandardScaler(), module.KNeighborsClassifier()),
            {"kneighborsclassifier__n_neighbors": [1, 3, 5]},
            cv=3,
        ).fit(X, y)
        for module in (ours, theirs)
    )
    assert mine.best_params_ == other.best_params_
    np.testing.assert_allclose(
        mine.cv_results_["mean_test_score"], other.cv_results_["mean_test_score"]
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_neighbors": 0}, r"n_neighbors must be a whole number from 1 on \(got 0\)"),
        ({"metric": "l1"}, "metric must be one of euclidean, cosine"),
        ({"radius": -1.0}, "radius must be a number from 0 on"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        ours.NearestNeighbors(**options).fit(np.zeros((3, 2)))
