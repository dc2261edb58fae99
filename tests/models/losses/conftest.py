"""Set-up of the tests of losses, of which there are hundreds."""

import pytest

# Failed assertions inside of the contract checks show their values.
pytest.register_assert_rewrite(
    'contract_cases', 'contract_calls', 'contract_state', 'contract_scores'
)


@pytest.fixture(scope='session', autouse=True)
def _own_cache(tmp_path_factory):
    """One cache for all of them: a folder for each test takes longer than most of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMDET_LT_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield
