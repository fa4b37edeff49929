// Package kernel drives the NBD client of the Linux kernel (drivers/block/nbd.c) over
// generic netlink: it connects /dev/nbdN to sockets on which somebody serves NBD, gives
// a device new sockets in place of dead ones, and takes devices away.
//
// The kernel's client speaks the transmission phase only, with simple replies.
// Negotiate does the handshake for it. The package knows no server and no device of
// ours; node/present/nbd puts the two together.
//
// Generic netlink of nbd exists in the initial network namespace only.
package kernel
