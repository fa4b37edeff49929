// Command sweep removes what labs left whose own process was killed: processes,
// mounts, loop devices, network namespaces and folders.
package main

import (
	"fmt"
	"os"

	"github.com/thaw-project/thaw/e2e/lab"
)

func main() {
	if err := lab.Sweep(); err != nil {
		fmt.Fprintln(os.Stderr, "sweep:", err)
		os.Exit(1)
	}
}
