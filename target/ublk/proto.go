package ublk

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The names and values are those of include/uapi/linux/ublk_cmd.h. Fields that are only
// there for the layout begin with a capital.

// Commands are encoded as ioctls are (UBLK_F_CMD_IOCTL_ENCODE): direction, size of the
// argument, 'u', number.
const (
	dirRead  = 2
	dirWrite = 1

	ctrlCmdBytes = 32
	ioCmdBytes   = 16
	ioDescBytes  = 24
	devInfoBytes = 64
	paramsBytes  = 60

	cmdGetDevInfo    = dirRead<<30 | ctrlCmdBytes<<16 | 'u'<<8 | 0x02
	cmdAddDev        = (dirRead|dirWrite)<<30 | ctrlCmdBytes<<16 | 'u'<<8 | 0x04
	cmdDelDev        = (dirRead|dirWrite)<<30 | ctrlCmdBytes<<16 | 'u'<<8 | 0x05
	cmdStartDev      = (dirRead|dirWrite)<<30 | ctrlCmdBytes<<16 | 'u'<<8 | 0x06
	cmdStopDev       = (dirRead|dirWrite)<<30 | ctrlCmdBytes<<16 | 'u'<<8 | 0x07
	cmdSetParams     = (dirRead|dirWrite)<<30 | ctrlCmdBytes<<16 | 'u'<<8 | 0x08
	cmdGetParams     = dirRead<<30 | ctrlCmdBytes<<16 | 'u'<<8 | 0x09
	cmdStartRecovery = (dirRead|dirWrite)<<30 | ctrlCmdBytes<<16 | 'u'<<8 | 0x10
	cmdEndRecovery   = (dirRead|dirWrite)<<30 | ctrlCmdBytes<<16 | 'u'<<8 | 0x11
	cmdGetDevInfo2   = dirRead<<30 | ctrlCmdBytes<<16 | 'u'<<8 | 0x12
	cmdGetFeatures   = dirRead<<30 | ctrlCmdBytes<<16 | 'u'<<8 | 0x13
	cmdDelDevAsync   = dirRead<<30 | ctrlCmdBytes<<16 | 'u'<<8 | 0x14

	ioFetch          = (dirRead|dirWrite)<<30 | ioCmdBytes<<16 | 'u'<<8 | 0x20
	ioCommitAndFetch = (dirRead|dirWrite)<<30 | ioCmdBytes<<16 | 'u'<<8 | 0x21
)

// Features, of a kernel and of a device.
const (
	featUserRecovery        = 1 << 3
	featUserRecoveryReissue = 1 << 4
	featIoctlEncode         = 1 << 6
	featPerIODaemon         = 1 << 13
	featNoAutoPartScan      = 1 << 18
)

var featureNames = map[uint64]string{
	featUserRecovery:        "user recovery",
	featUserRecoveryReissue: "user recovery with requests issued again",
	featIoctlEncode:         "commands encoded as ioctls",
}

// State is what the kernel says of a device.
type State uint16

// The states (UBLK_S_DEV_*).
const (
	Dead     State = 0 // not started yet, or stopped: there is no block device
	Live     State = 1 // served
	Quiesced State = 2 // its server is gone; requests wait for the next
	FailIO   State = 3 // its server is gone; requests fail
)

func (s State) String() string {
	switch s {
	case Dead:
		return "dead"
	case Live:
		return "live"
	case Quiesced:
		return "quiesced"
	case FailIO:
		return "failing"
	}
	return "unknown"
}

// ctrlCmd is struct ublksrv_ctrl_cmd.
type ctrlCmd struct {
	dev     uint32
	queue   uint16 // always noQueue
	len     uint16
	addr    uint64
	data    uint64
	pathLen uint16
	Pad     uint16
	Pad2    uint32
}

const (
	noQueue   = 0xffff
	anyDevice = 0xffffffff
)

// devInfo is struct ublksrv_ctrl_dev_info.
type devInfo struct {
	queues, depth uint16
	state         State
	Pad           uint16
	maxIOBytes    uint32
	id            uint32
	pid           int32
	Pad2          uint32
	flags         uint64
	owner         uint64    // ublksrv_flags, which the kernel keeps for the server
	UserGroup     [2]uint32 // of who made it
	Reserved      [2]uint64
}

// params is struct ublk_params, up to its discard part.
type params struct {
	len, types uint32
	basic      paramBasic
	discard    paramDiscard
	Pad        uint32 // not sent
}

type paramBasic struct {
	attrs         uint32
	logicalShift  uint8
	physicalShift uint8
	optimalShift  uint8
	minimumShift  uint8
	maxSectors    uint32
	ChunkSectors  uint32
	devSectors    uint64
	VirtBoundary  uint64
}

type paramDiscard struct {
	Alignment             uint32
	granularity           uint32
	maxDiscardSectors     uint32
	maxWriteZeroesSectors uint32
	maxDiscardSegments    uint16
	Pad                   uint16
}

const (
	paramTypeBasic   = 1 << 0
	paramTypeDiscard = 1 << 1

	attrReadOnly      = 1 << 0
	attrVolatileCache = 1 << 2
	attrFUA           = 1 << 3
)

// ioCmd is struct ublksrv_io_cmd.
type ioCmd struct {
	queue, tag uint16
	result     int32
	addr       uint64
}

// ioDesc is struct ublksrv_io_desc.
type ioDesc struct {
	opFlags     uint32
	sectors     uint32
	startSector uint64
	addr        uint64
}

const (
	opRead        = 0
	opWrite       = 1
	opFlush       = 2
	opDiscard     = 3
	opWriteZeroes = 5

	opMask  = 0xff
	flagFUA = 1 << 13

	resOK    = 0
	resAbort = -int32(unix.ENODEV)

	maxQueueDepth = 4096 // UBLK_MAX_QUEUE_DEPTH
	sectorShift   = 9
)

// bytesOf is v as the kernel sees it. v must stay alive, and on the heap or in mapped
// memory if the kernel is to see it later.
func bytesOf[T devInfo | params | ctrlCmd | ioCmd](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}
