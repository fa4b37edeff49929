package keeper

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// Each message is one packet of a SOCK_SEQPACKET socket; a descriptor travels with
// it as SCM_RIGHTS.
//
//	request  0  1  operation
//	         1  -  name (put, get, drop), at most 128 bytes, or empty
//	reply    0  1  status: 0 ok, 1 error
//	         1  -  ok: names separated by newlines (list), or empty
//	               error: kind, newline, text
const (
	opPut  = 'p'
	opGet  = 'g'
	opDrop = 'd'
	opList = 'l'
	opExit = 'x'

	statusOK    = 0
	statusError = 1

	maxNameBytes = 128
	// maxMessageBytes holds the list of all names a keeper can have.
	maxMessageBytes = 1 + maxDescriptors*(maxNameBytes+1)
)

func validName(name string) bool {
	if name == "" || len(name) > maxNameBytes {
		return false
	}
	for i := range len(name) {
		if name[i] <= ' ' || name[i] >= 0x7f {
			return false
		}
	}
	return true
}

func parseRequest(b []byte) (op byte, name string, err error) {
	if len(b) == 0 {
		return 0, "", kind.Errorf(kind.Invalid, "keeper: empty request")
	}
	op, name = b[0], string(b[1:])
	switch op {
	case opPut, opGet, opDrop:
		if !validName(name) {
			return 0, "", kind.Errorf(kind.Invalid, "keeper: name %.200q is empty, too long or has other than visible ASCII characters", name)
		}
	case opList, opExit:
		if name != "" {
			return 0, "", kind.Errorf(kind.Invalid, "keeper: request %q takes no name", op)
		}
	default:
		return 0, "", kind.Errorf(kind.Invalid, "keeper: unknown request %q", op)
	}
	return op, name, nil
}

func errorReply(err error) []byte {
	b := fmt.Appendf([]byte{statusError}, "%s\n%s", string(kind.Of(err)), err)
	return b[:min(len(b), maxMessageBytes)]
}

func parseReply(b []byte) (string, error) {
	if len(b) == 0 {
		return "", kind.Errorf(kind.Unavailable, "keeper: empty reply")
	}
	if b[0] == statusOK {
		return string(b[1:]), nil
	}
	k, text, _ := strings.Cut(string(b[1:]), "\n")
	if k == "" {
		return "", errors.New(text)
	}
	return "", kind.Errorf(kind.Kind(k), "%s", text)
}

func send(c *net.UnixConn, b []byte, fd int) error {
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	_, _, err := c.WriteMsgUnix(b, oob, nil)
	return err
}

// receive reads one packet and the descriptor that came with it, or -1. Surplus
// descriptors are closed and make it an error, as does a packet or control message
// that did not fit.
func receive(c *net.UnixConn, buf []byte) ([]byte, int, error) {
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, -1, err
	}
	fds, err := parseRights(oob[:oobn])
	switch {
	case err != nil:
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = kind.Errorf(kind.Invalid, "keeper: message too long")
	case len(fds) > 1:
		err = kind.Errorf(kind.Invalid, "keeper: %d descriptors in one message", len(fds))
	case n == 0 && len(fds) == 0:
		err = io.EOF // no request or reply is empty
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, -1, err
	}
	fd := -1
	if len(fds) == 1 {
		fd = fds[0]
	}
	return bytes.Clone(buf[:n]), fd, nil
}

func parseRights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("keeper: control message: %w", err)
	}
	var all []int
	for i := range messages {
		if messages[i].Header.Level != unix.SOL_SOCKET || messages[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return all, fmt.Errorf("keeper: control message: %w", err)
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
		}
		all = append(all, fds...)
	}
	return all, nil
}

// checkPeer refuses peers of another user: what the keeper holds is as good as root.
func checkPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return fmt.Errorf("keeper: peer credentials: %w", credErr)
	}
	if int(cred.Uid) != os.Geteuid() {
		return kind.Errorf(kind.Denied, "keeper: peer has uid %d, not %d", cred.Uid, os.Geteuid())
	}
	return nil
}
