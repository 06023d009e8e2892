"""Both stages on a mixture of experts, step by step from the equations: test_steps with that backbone."""

import mixture
import pytest
from test_steps import (  # noqa: F401 (they run here)
    pairs,
    plain,
    stage1,
    stage2,
    start,
    test_stage_1_logs_what_the_equations_give,
    test_stage_1_moves_every_weight_as_adamw_would,
    test_stage_2_logs_what_the_equations_give,
    test_stage_2_moves_every_weight_as_adamw_would,
    test_stage_2_thinks_about_each_video_of_a_step_with_the_weights_before_it,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    # Which of two experts that are nearly as likely is chosen is a matter of rounding: here all are.
    return mixture.write(tmp_path_factory.mktemp("mixture"), chosen=mixture.EXPERTS)
