// Package dpusim plays the PCIe side of a card: opi.Functions for a host that QEMU
// emulates. A function is a pcie-root-port of the machine, rp0 to rpN-1. To plug one has
// `thaw target` serve the subsystem's disk by NBD on a Unix socket, and QEMU show it as an
// NVMe controller behind that port. So the host sees what it would see of a card, and all
// above opi.Functions is the real thing.
//
// It keeps nothing: names in QEMU and in the target say which function shows which
// subsystem, so whoever was killed between two steps is understood by the next, who
// completes what was begun or removes it.
//
// QEMU serves one QMP client at a time and keeps others waiting. Each operation
// connects, and none keeps the connection while it waits for the host, so several
// bridges, and a test, may share a machine.
//
// The package knows QEMU, subsystems and bdevs. It must not know blocks, nodes or images.
package dpusim
