//go:build ceph

package rbd

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/rados"
	"github.com/ceph/go-ceph/rbd"

	"github.com/thaw-project/thaw/kind"
)

// Present tells whether this build has Ceph.
const Present = true

// cluster is a connection with one pool.
type cluster struct {
	conn *rados.Conn
	pool *rados.IOContext
	fsid string
}

// connect connects in at most o.Timeout.
func connect(ctx context.Context, o Options) (*cluster, error) {
	type answer struct {
		c   *cluster
		err error
	}
	// librados bounds the connection by client_mount_timeout; the channel has room for who
	// answers after the context has ended, and what it holds is closed then.
	answers := make(chan answer, 1)
	go func() {
		c, err := dial(o)
		answers <- answer{c, err}
	}()
	select {
	case a := <-answers:
		return a.c, a.err
	case <-ctx.Done():
		go func() {
			if a := <-answers; a.c != nil {
				a.c.close()
			}
		}()
		return nil, kind.Errorf(kind.Canceled, "connect to Ceph: %w", context.Cause(ctx))
	}
}

func dial(o Options) (*cluster, error) {
	conn, err := rados.NewConnWithUser(o.User)
	if err != nil {
		return nil, wrap(err, "Ceph client")
	}
	if o.Config != "" {
		err = conn.ReadConfigFile(o.Config)
	} else {
		err = conn.ReadDefaultConfigFile()
	}
	if err != nil {
		conn.Shutdown()
		return nil, wrap(err, "read Ceph's configuration %s", o.Config)
	}
	seconds := strconv.Itoa(max(1, int(o.Timeout/time.Second)))
	options := [][2]string{
		{"client_mount_timeout", seconds},
		// No cache of librbd's: what was acknowledged must survive the process, for the kernel
		// that wrote it does. The kernel's page cache is above.
		{"rbd_cache", "false"},
		// A discarded range reads as zeros to the byte.
		{"rbd_skip_partial_discard", "false"},
		{"rbd_default_clone_format", "2"},
		{"admin_socket", ""},
		{"log_file", ""},
		{"log_to_stderr", "false"},
	}
	if o.Keyring != "" {
		options = append(options, [2]string{"keyring", o.Keyring})
	}
	for _, s := range options {
		if err := conn.SetConfigOption(s[0], s[1]); err != nil {
			conn.Shutdown()
			return nil, wrap(err, "set %s of the Ceph client", s[0])
		}
	}
	if err := conn.Connect(); err != nil {
		conn.Shutdown()
		return nil, wrap(err, "connect to Ceph as client.%s", o.User)
	}
	c := &cluster{conn: conn}
	if c.fsid, err = conn.GetFSID(); err == nil {
		c.pool, err = conn.OpenIOContext(o.Pool)
	}
	if err != nil {
		conn.Shutdown()
		return nil, wrap(err, "open pool %s of Ceph", o.Pool)
	}
	return c, nil
}

func (c *cluster) close() {
	c.pool.Destroy()
	c.conn.Shutdown()
}

// Errnos of librados that mean more there than elsewhere.
const (
	errBlocklisted = 108  // ESHUTDOWN: another process has taken over
	errCompare     = 4095 // and above: a compared extent differs at that offset
)

func errno(err error) int {
	var op rados.OperationError
	if errors.As(err, &op) {
		err = op.OpError
	}
	var c interface{ ErrorCode() int }
	if !errors.As(err, &c) {
		return 0
	}
	return -c.ErrorCode()
}

func isNotFound(err error) bool { return errno(err) == int(syscall.ENOENT) }
func isExists(err error) bool   { return errno(err) == int(syscall.EEXIST) }

// wrap says what was being done and marks err with its kind. An error that has one keeps it.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	what := fmt.Sprintf(format, args...)
	k := kind.Of(err)
	switch n := errno(err); {
	case n == 0:
	case n == errBlocklisted:
		return kind.Errorf(kind.Unavailable, "%s: another process has taken over, and Ceph refuses this one: %w", what, err)
	case n >= errCompare:
		return kind.Errorf(kind.Unavailable, "%s: another process has taken over the store", what)
	case n == int(syscall.ETIMEDOUT), n == int(syscall.ENOTCONN), n == int(syscall.EHOSTUNREACH):
		k = kind.Unavailable
	case n == int(syscall.ENOTEMPTY):
		k = kind.InUse
	default:
		k = kind.Of(syscall.Errno(n))
	}
	if k == "" {
		switch {
		case errors.Is(err, rbd.ErrImageNotOpen):
			k = kind.Unavailable
		default:
			k = kind.IO
		}
	}
	return kind.Errorf(k, "%s: %w", what, err)
}
