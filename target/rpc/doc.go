// Package rpc is the JSON-RPC dialect that SPDK speaks over a Unix socket: a server
// for tools written for SPDK. Package spdk is the client.
//
// The wire is a stream of JSON values with nothing between them. A client may send
// several requests before it reads an answer and may close its sending side after the
// last one; requests of one connection are answered in order. An array is a batch, as
// in JSON-RPC 2.0. After a value that is no JSON the server answers -32700 and closes,
// since nothing tells where the next request would begin.
//
// The package knows framing, errors and parameters. It must not know what the methods
// do: no devices, no NVMe, no lvols.
//
// # What a client can cost
//
// A connection holds at most one request of MaxRequestBytes and its answer. A request
// that has begun must end, and an answer must be taken, within Options.Patience. There
// are at most Options.MaxConns connections; when one more comes, the one that has been
// idle longest goes.
package rpc
