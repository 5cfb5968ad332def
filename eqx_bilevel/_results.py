import optimistix as optx


# Extends `optimistix.RESULTS`, whose messages apply here too.
class RESULTS(optx.RESULTS):  # pyright: ignore[reportGeneralTypeIssues]
    """What came of a solve. `RESULTS[result]` is the message; the [FAQ](../faq.md) says
    what to do. It extends `optimistix.RESULTS`, of which occur

    - `successful`;
    - `nonlinear_max_steps_reached`: Gauss-Newton did not converge in `max_steps`;

    and has beside these

    - `singular_gram`: the Gram matrix could not be factorised (or, without a matrix,
        conjugate gradients did not converge), even with the largest nugget tried;
    - `nonfinite_data`: a hyperparameter, a point or a target is inf or nan;
    - `nonfinite_operator`: an operator or one of its derivatives is, at its
        `reference`;
    - `no_scale`: the prior variance of a condition is zero there, so that a nugget is
        relative to nothing;
    - `duplicate_points`: a condition without noise has the same point twice.
    """

    successful = ""
    nonfinite_data = (
        "A hyperparameter, a point or a target is not finite (it is inf or nan)."
    )
    singular_gram = (
        "The Gram matrix could not be factorised, even with the largest jitter that "
        "is tried. Lengthscales may be far too long for the distance of the points, "
        "or the operators may return inf or nan where the solve starts."
    )
    nonfinite_operator = (
        "An operator or one of its derivatives is not finite (it is inf or nan) where "
        "it is linearised for its nugget, which is at the prior's mean unless the "
        "condition has a `reference`. Give it one, or write the operator such that it "
        "is finite there: `sqrt(x + 1e-12)` instead of `sqrt(x)`, for example. Or it "
        "is the kernel that is not finite, or has no such derivatives, where both of "
        "its points are the same."
    )
    no_scale = (
        "The prior variance of a condition's linearised operator is zero, so that "
        "there is nothing to which a nugget could be relative. Give the condition a "
        "`reference` at which its linearisation does not vanish, or a `noise`."
    )
    duplicate_points = (
        "A condition without noise has the same point twice. Remove the copies, or "
        "give the condition a `noise`."
    )
