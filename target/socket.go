package target

import (
	"context"
	"encoding/json"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/nbd"
	"github.com/thaw-project/thaw/target/rpc"
)

// A bdev may be served by NBD on a Unix socket of its own: thaw_nbd_export,
// thaw_nbd_unexport and thaw_nbd_get_exports, which SPDK does not have. It is what plays
// a card's PCIe function with: see opi/dpusim.

const (
	// maxSockets bounds the exports, each of which has a server.
	maxSockets = 1024
	// socketConnections bounds the clients of one export: a machine emulator, and
	// somebody who looks.
	socketConnections = 16
	// socketBufferBytes bounds what the requests in flight of one export take.
	socketBufferBytes = 32 << 20
	// socketPatience is how long connections may finish what they serve when their
	// export ends.
	socketPatience = 10 * time.Second
	// maxSocketPath is what the kernel takes (sun_path, with its zero byte).
	maxSocketPath = 107
)

// socketExport is a bdev that is served on a socket.
type socketExport struct {
	lease  *lease
	p      socketParams
	server *nbd.Server
}

type socketParams struct {
	Bdev   string `json:"bdev_name"`
	Socket string `json:"socket"`
	// NQN is a subsystem that shows the bdev: the socket is another way to the same
	// nvmeNamespace, has part in its claim, and goes with it.
	NQN string `json:"nqn,omitempty"`
}

func (t *Target) exportSocket(params json.RawMessage) (any, error) {
	var p socketParams
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	if !filepath.IsAbs(p.Socket) || filepath.Clean(p.Socket) != p.Socket || len(p.Socket) > maxSocketPath {
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "socket %.128q: it must be an absolute path of at most %d bytes, in its shortest form", p.Socket, maxSocketPath))
	}
	d, err := t.find(p.Bdev)
	if err != nil {
		return nil, err
	}
	p.Bdev = d.name
	if have := t.sockets[p.Socket]; have != nil {
		if have.p == p {
			return true, nil
		}
		return nil, rpc.Errno(syscall.EEXIST, kind.Errorf(kind.Exists, "socket %s serves bdev %s", p.Socket, have.p.Bdev))
	}
	if len(t.sockets) >= maxSockets {
		return nil, rpc.Errno(syscall.ENOSPC, kind.Errorf(kind.NoSpace, "there are %d NBD exports", maxSockets))
	}
	l := &lease{what: "NBD socket " + p.Socket, claim: exclusiveWrite, write: !d.driver.readOnly(), fixed: true}
	if p.NQN != "" {
		if l.with = t.exportOf(p.NQN, d); l.with == nil {
			return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "subsystem %.223q does not show bdev %s", p.NQN, d.name))
		}
	}
	if err := t.acquire(d, l); err != nil {
		return nil, err
	}
	x := &socketExport{lease: l, p: p, server: nbd.New(nbd.Config{MaxConnections: socketConnections, MaxBufferBytes: socketBufferBytes, Engine: t.o.Engine, Log: t.log})}
	block := int(d.blockBytes)
	err = x.server.AddExport(nbd.Export{Description: d.name, Device: l.dev, MinBlock: block, PreferredBlock: max(block, 4096)})
	if err == nil {
		err = x.server.ListenUnix(p.Socket)
	}
	if err != nil {
		t.endSocket(x)
		if kind.Of(err) == kind.InUse {
			return nil, rpc.Errno(syscall.EADDRINUSE, err)
		}
		return nil, errnoOfKernel(err)
	}
	failpoint.Reach("target.nbd_export: listening")
	t.sockets[p.Socket] = x
	l.evict = func(wanted bool) { t.socketGone(x, wanted) }
	if err := t.keep(classSocket, p.Socket, "thaw_nbd_export", p); err != nil {
		delete(t.sockets, p.Socket)
		t.endSocket(x)
		return nil, err
	}
	return true, nil
}

// exportOf finds a subsystem's hold of a bdev.
func (t *Target) exportOf(nqn string, d *disk) *lease {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for e, l := range t.exports {
		if e.nqn == nqn && l.disk == d {
			return l
		}
	}
	return nil
}

// endSocket ends the connections and the server of an export, and lets go of its bdev.
func (t *Target) endSocket(x *socketExport) {
	ctx, cancel := context.WithTimeout(context.Background(), socketPatience)
	defer cancel()
	if err := x.server.Shutdown(ctx); err != nil {
		t.log.Warn("end NBD export", "socket", x.p.Socket, "err", err)
	}
	x.lease.release()
}

// socketGone ends an export whose bdev, or whose nvmeNamespace, goes.
func (t *Target) socketGone(x *socketExport, wanted bool) {
	if t.sockets[x.p.Socket] != x {
		return // with its nvmeNamespace
	}
	delete(t.sockets, x.p.Socket)
	t.endSocket(x)
	key := objectKey(classSocket, x.p.Socket)
	if !wanted {
		t.lost(key)
	} else if err := t.forgetKeys(key); err != nil {
		t.log.Error("NBD export stays on record", "socket", x.p.Socket, "err", err)
	}
}

// partnersOf returns the keys of exports that go with a subsystem, made or not. The
// caller holds admin.
func (t *Target) partnersOf(nqn string) (keys []string) {
	for path, x := range t.sockets {
		if x.p.NQN == nqn {
			keys = append(keys, objectKey(classSocket, path))
		}
	}
	for key, o := range t.pending {
		var p socketParams
		if strings.HasPrefix(key, objectKey(classSocket)) && json.Unmarshal(o.Params, &p) == nil && p.NQN == nqn {
			keys = append(keys, key)
		}
	}
	return keys
}

// endPartners ends the exports that have part in a lease. The caller holds admin.
func (t *Target) endPartners(l *lease, wanted bool) {
	for _, path := range slices.Sorted(maps.Keys(t.sockets)) {
		if x := t.sockets[path]; x.lease.with == l {
			t.socketGone(x, wanted)
		}
	}
}

func (t *Target) unexportSocket(params json.RawMessage) (any, error) {
	var p struct {
		Bdev   string `json:"bdev_name,omitempty"`
		Socket string `json:"socket,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	if (p.Bdev == "") == (p.Socket == "") {
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "either bdev_name or socket must be given"))
	}
	var paths []string
	if p.Socket != "" {
		if t.sockets[p.Socket] != nil || t.isPending(classSocket, p.Socket) {
			paths = append(paths, p.Socket)
		}
	} else if d := t.lookup(p.Bdev); d != nil {
		for path, x := range t.sockets {
			if x.lease.disk == d {
				paths = append(paths, path)
			}
		}
	}
	if len(paths) == 0 {
		return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "%.160q is not served by NBD", p.Bdev+p.Socket))
	}
	slices.Sort(paths)
	for _, path := range paths {
		if err := t.forget(classSocket, path); err != nil {
			return nil, err
		}
		if x := t.sockets[path]; x != nil {
			delete(t.sockets, path)
			t.endSocket(x)
		}
	}
	return true, nil
}

func (t *Target) getSockets(params json.RawMessage) (any, error) {
	var p struct {
		Bdev   string `json:"bdev_name,omitempty"`
		Socket string `json:"socket,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	var only *disk
	if p.Bdev != "" {
		var err error
		if only, err = t.find(p.Bdev); err != nil {
			return nil, err
		}
	}
	type info struct {
		Bdev        string `json:"bdev_name"`
		Socket      string `json:"socket"`
		NQN         string `json:"nqn,omitempty"`
		ReadOnly    bool   `json:"read_only"`
		Connections int    `json:"connections"`
	}
	list := []info{}
	for _, path := range slices.Sorted(maps.Keys(t.sockets)) {
		if x := t.sockets[path]; (only == nil || only == x.lease.disk) && (p.Socket == "" || p.Socket == path) {
			list = append(list, info{x.lease.disk.name, path, x.p.NQN, !x.lease.write, x.server.Connections()})
		}
	}
	return list, nil
}

// closeSockets ends all exports; what is on record stays.
func (t *Target) closeSockets() {
	for path, x := range t.sockets {
		delete(t.sockets, path)
		t.endSocket(x)
	}
}
