package nvme

import (
	"fmt"

	"github.com/thaw-project/thaw/kind"
)

// Status is the status field of a completion without the phase bit: status code in
// bits 7:0, type in 10:8, retry delay in 12:11, more in 13, do not retry in 14
// (Base 3.3.3.2.1).
type Status uint16

// Status values: generic, command specific with those of Fabrics, and media (Base
// 3.3.3.2.1; the NVM command set adds its own).
const (
	Success              Status = 0x000
	InvalidOpcode        Status = 0x001
	InvalidField         Status = 0x002
	CommandIDConflict    Status = 0x003
	DataTransferError    Status = 0x004
	InternalError        Status = 0x006
	AbortRequested       Status = 0x007
	AbortedSQDeletion    Status = 0x008
	InvalidNvmeNamespace Status = 0x00b // Invalid Namespace or Format
	SequenceError        Status = 0x00c
	SGLCountInvalid      Status = 0x00e
	SGLLengthInvalid     Status = 0x00f
	SGLTypeInvalid       Status = 0x011
	SGLOffsetInvalid     Status = 0x016
	KeepAliveExpired     Status = 0x018
	KeepAliveInvalid     Status = 0x019
	WriteProtected       Status = 0x020
	TransientTransport   Status = 0x022
	LBAOutOfRange        Status = 0x080
	CapacityExceeded     Status = 0x081
	NotReady             Status = 0x082

	InvalidQueue       Status = 0x101
	InvalidQueueSize   Status = 0x102
	AbortLimit         Status = 0x103
	AsyncEventLimit    Status = 0x105
	InvalidLogPage     Status = 0x109
	FeatureNotSaveable Status = 0x10d
	FeatureNotChanging Status = 0x10e
	FeatureNotPerNS    Status = 0x10f
	CrossResetBusy     Status = 0x13f // Cross-Controller Reset in Progress (Base 2.3)
	CrossResetLimit    Status = 0x141 // Cross-Controller Reset Limit Exceeded (Base 2.3)

	ConnectFormat      Status = 0x180
	ConnectBusy        Status = 0x181
	ConnectInvalidParm Status = 0x182
	ConnectRestart     Status = 0x183
	ConnectInvalidHost Status = 0x184
	InvalidQueueType   Status = 0x185
	DiscoverRestart    Status = 0x190
	AuthRequired       Status = 0x191

	WriteFault     Status = 0x280
	UnrecoveredErr Status = 0x281
	CompareFailure Status = 0x285

	// PathError is the first of the path related codes, which a host makes up for
	// commands that a path could not finish.
	HostPathError Status = 0x370

	DNR  Status = 1 << 14 // do not retry
	More Status = 1 << 13 // there is more in the error log
)

// Code is the status without retry delay, more and do not retry.
func (s Status) Code() Status { return s & 0x7ff }

// OK tells whether the command succeeded.
func (s Status) OK() bool { return s.Code() == Success }

var statusNames = map[Status]string{
	Success: "success", InvalidOpcode: "invalid opcode", InvalidField: "invalid field", CommandIDConflict: "command ID conflict",
	DataTransferError: "data transfer error", InternalError: "internal error", AbortRequested: "abort requested",
	AbortedSQDeletion: "aborted by queue deletion", InvalidNvmeNamespace: "invalid nvmeNamespace", SequenceError: "command sequence error",
	SGLCountInvalid: "invalid number of SGL descriptors", SGLLengthInvalid: "data SGL length invalid", SGLTypeInvalid: "SGL descriptor type invalid",
	SGLOffsetInvalid: "SGL offset invalid", KeepAliveExpired: "keep alive timeout expired", KeepAliveInvalid: "keep alive timeout invalid",
	WriteProtected: "nvmeNamespace is write protected", TransientTransport: "transient transport error", LBAOutOfRange: "LBA out of range",
	CapacityExceeded: "capacity exceeded", NotReady: "nvmeNamespace not ready", InvalidQueue: "invalid queue identifier",
	InvalidQueueSize: "invalid queue size", AbortLimit: "abort command limit exceeded", AsyncEventLimit: "asynchronous event request limit exceeded",
	InvalidLogPage: "invalid log page", FeatureNotSaveable: "feature not saveable", FeatureNotChanging: "feature not changeable",
	FeatureNotPerNS: "feature not specific to an nvmeNamespace", CrossResetBusy: "cross-controller reset in progress",
	CrossResetLimit: "cross-controller reset limit exceeded", ConnectFormat: "connect incompatible format",
	ConnectBusy: "connect controller busy", ConnectInvalidParm: "connect invalid parameters", ConnectRestart: "connect restart discovery",
	ConnectInvalidHost: "connect invalid host", InvalidQueueType: "invalid queue type", DiscoverRestart: "discover restart",
	AuthRequired: "authentication required", WriteFault: "write fault", UnrecoveredErr: "unrecovered read error",
	CompareFailure: "compare failure", HostPathError: "host path error",
}

func (s Status) String() string {
	n, ok := statusNames[s.Code()]
	if !ok {
		n = "status"
	}
	if s&DNR != 0 {
		return fmt.Sprintf("%s (%#03x, do not retry)", n, uint16(s.Code()))
	}
	return fmt.Sprintf("%s (%#03x)", n, uint16(s.Code()))
}

// StatusError is a command that failed with a status.
type StatusError struct{ Status Status }

func (e *StatusError) Error() string { return e.Status.String() }

// Is gives the status a kind.
func (e *StatusError) Is(target error) bool {
	k, ok := target.(kind.Kind)
	return ok && k == e.Status.Kind()
}

// Err returns nil for success, else an error marked with the status' kind.
func (s Status) Err() error {
	if s.OK() {
		return nil
	}
	return kind.Wrap(s.Kind(), &StatusError{s})
}

// Kind maps a status to the kind that callers of a device act on.
func (s Status) Kind() kind.Kind {
	switch s.Code() {
	case Success:
		return ""
	case InvalidOpcode:
		return kind.Unsupported
	case InvalidField, LBAOutOfRange, ConnectFormat, ConnectInvalidParm, InvalidLogPage, InvalidQueue, InvalidQueueSize,
		SGLLengthInvalid, SGLTypeInvalid, SGLOffsetInvalid, KeepAliveInvalid:
		return kind.Invalid
	case InvalidNvmeNamespace:
		return kind.NotFound
	case WriteProtected:
		return kind.ReadOnly
	case CapacityExceeded:
		return kind.NoSpace
	case UnrecoveredErr, CompareFailure:
		return kind.Corrupt
	case ConnectInvalidHost, AuthRequired:
		return kind.Denied
	case AbortRequested:
		return kind.Canceled
	case ConnectBusy, NotReady, ConnectRestart, DiscoverRestart, TransientTransport, HostPathError, AbortedSQDeletion, KeepAliveExpired,
		CrossResetBusy, CrossResetLimit:
		return kind.Unavailable
	}
	return kind.IO
}

// Refuses tells whether a Connect was answered by a target that has no such subsystem or
// does not let the host in.
func (s Status) Refuses() bool {
	return s.Code() == ConnectInvalidParm || s.Code() == ConnectInvalidHost
}

// StatusOf maps an error of a device to a status. write tells which way the data
// went. What a retry cannot change carries DNR.
func StatusOf(err error, write bool) Status {
	if err == nil {
		return Success
	}
	switch kind.Of(err) {
	case kind.ReadOnly:
		return WriteProtected | DNR
	case kind.NoSpace:
		return CapacityExceeded | DNR
	case kind.Corrupt:
		if !write {
			return UnrecoveredErr | DNR
		}
		return WriteFault | DNR
	case kind.Invalid:
		return InvalidField | DNR
	case kind.Unsupported:
		return InvalidOpcode | DNR
	case kind.Unavailable:
		return NotReady
	case kind.Canceled:
		return AbortRequested
	}
	return InternalError
}
