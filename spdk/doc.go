// Package spdk is a client of SPDK's JSON-RPC methods, for any process that answers
// them: SPDK itself, an SPDK on a card, or `thaw target`. Every method that Thaw uses
// has a function here with typed parameters and results; Client.Call is for the others.
//
// Many calls may be in flight on one connection; answers are matched by id, in any order.
// A connection that broke is made anew by the next call. Methods that take long (those
// that copy, connect or wait) each have a connection of their own, since a target may
// answer the requests of one connection in order.
//
// The package knows the wire and the methods. It must not know what they are used for,
// and no target of ours: what it believes it has read.
//
// # What a server can cost
//
// Calls in flight, the size of an answer and the time until it comes are bounded. A
// server that sends what is no answer to any request loses its connection, and the calls
// on it fail.
//
// # What an error says
//
// An answer that is an error is an *Error. Few of SPDK's codes say what happened, so few
// have a kind of package kind: whoever changes something reads what is there, compares,
// acts, and reads again. After an error that Unanswered reports, the change may have been
// made or not.
package spdk
