// Package e2e holds the end-to-end tests: containerd, a registry and thaw server as a
// user runs them, started in folders of their own by package lab.
//
// They run when THAW_E2E=1 is set ("make e2e" and "make test" do), as root, with the
// programs that "make deps tools build" installs and builds.
package e2e
