package functiontest_test

import (
	"testing"

	"github.com/thaw-project/thaw/opi"
	"github.com/thaw-project/thaw/opi/functiontest"
)

func TestMemory(t *testing.T) {
	functiontest.Run(t, func(*testing.T) functiontest.Subject {
		return functiontest.Subject{
			Functions: &functiontest.Memory{Physical: 2, Virtual: 1}, NQNs: [2]string{"nqn.a", "nqn.b"},
			Have: [2]opi.Function{{}, {Physical: 1, Virtual: 1}}, Lacks: opi.Function{Physical: 2},
			Lose: func() {}, // what is below is nothing
		}
	})
}
