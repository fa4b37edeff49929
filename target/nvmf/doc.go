// Package nvmf is an NVMe over Fabrics target on TCP: it serves block devices as
// nvmeNamespaces of subsystems to any host that follows NVM Express Base 2.0 and the
// NVMe/TCP Transport Specification 1.0.
//
// It sees devices only as bdev.Device and knows nothing of what stores the bytes.
// Subsystems, nvmeNamespaces, listeners and allowed hosts are added and removed while
// hosts are connected; the methods of Target are made for the JSON-RPC methods
// nvmf_*.
//
// # How a connection works
//
// Every connection is one queue and has one goroutine, its reader. Commands for an
// nvmeNamespace that is Inline, or Adaptive and fast, are served by the reader itself:
// data goes from the device straight into the buffer that is sent, and what was served
// while the socket had more to read leaves in one write. A writable device is used by
// one reader at a time, who also serves what others want of it meanwhile
// (engine.Owner). Other commands run on goroutines of the connection, at most one per
// queue entry, and whoever finishes first sends for all. Nothing is shared between
// connections on this path: each counts its own use of an nvmeNamespace, and removal
// looks at the counts. Options.Engine can have a thread pool serve everything instead.
// docs/engine.md has the reasons and the figures.
//
// # What a peer can cost
//
// A connection holds a receive buffer of ReceiveBytes, and while commands with data
// come fast one of the largest transfer. Data in flight takes at most
// Options.MemoryPerConn, half of it for reads and data that came in capsules, half
// for writes that wait for data; beyond that the reader waits, or the R2T does. A
// peer that stops in the middle of a PDU, of the handshake or of taking its answers
// is dropped after the timeout in Options. What is idle between PDUs may stay, if it
// keeps its keep alive timer or asked for none.
package nvmf
