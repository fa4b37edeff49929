// Package kill proves that the control chain survives the death of any of its processes
// at any step: targets, bridges, attachers and image-mgmt run as processes of their own,
// built with failpoints, are killed at every point that a flow reaches and at pairs of
// points, are started again, and then must have done what was asked, once, and nothing
// else.
//
// It has tests only: THAW_E2E=1 runs them, THAW_KILL=all with all pairs of steps ("make
// test-kill"), THAW_KILL=every also with the second and third time that a flow reaches a
// step, THAW_KILL=n with n pairs each way; THAW_SEED=n repeats a sample. The package knows
// processes by their arguments and their sockets; it must not reach into one.
package kill
