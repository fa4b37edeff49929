//go:build ceph

package rbd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/rados"
	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
)

const (
	lockName   = "thaw"
	lockCookie = "store"

	// mayRenew is LIBRADOS_LOCK_FLAG_MAY_RENEW: the lock is taken, or the own one renewed.
	mayRenew = 1
)

// session is this process's time with the store.
type session struct {
	c    *cluster
	oid  string
	id   string
	lost atomic.Bool // another process has the store
}

// sessionRecord is what the next process must know of one that was killed.
type sessionRecord struct {
	ID      string    `json:"id"`
	Address string    `json:"address"` // of its Ceph client, as the blocklist has it
	Holder  processID `json:"holder"`
}

// processID tells processes of one machine apart, over its reboots.
type processID struct {
	Host  string `json:"host"`
	Boot  string `json:"boot"`
	Space string `json:"space"` // the namespace that Pid is of
	Pid   int    `json:"pid"`
	Start string `json:"start"` // in clock ticks since the boot
}

func ownProcess() processID {
	p := processID{Pid: os.Getpid()}
	p.Host, _ = os.Hostname() // empty is another host to everybody
	if boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		p.Boot = strings.TrimSpace(string(boot))
	}
	p.Space, _ = os.Readlink("/proc/self/ns/pid")
	p.Start = processStart(p.Pid)
	return p
}

// processStart is the start of a process, "" when there is none.
func processStart(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The command's name may contain anything; the third field follows its last ')'.
	_, rest, _ := strings.Cut(string(data[strings.LastIndexByte(string(data), ')')+1:]), " ")
	if fields := strings.Fields(rest); len(fields) > 19 && fields[0] != "Z" {
		return fields[19]
	}
	return ""
}

// dead tells that p has ended for certain. Of another machine nobody knows.
func (p processID) dead() bool {
	me := ownProcess()
	switch {
	case p.Host == "" || p.Host != me.Host || p.Boot == "" || me.Boot == "":
		return false
	case p.Boot != me.Boot:
		return true
	case p.Space != me.Space:
		return false
	}
	return p.Start == "" || processStart(p.Pid) != p.Start
}

// beginSession takes the store, from a dead process if need be. kind.InUse when a living
// one has it, or one that may live.
func beginSession(c *cluster, oid string, lease time.Duration) (*session, error) {
	if err := (&session{c: c, oid: oid}).take(lease); err != nil {
		return nil, err
	}
	address, err := c.conn.GetAddrs()
	if err != nil {
		return nil, wrap(err, "ask for this client's address")
	}
	s := &session{c: c, oid: oid, id: uuid.NewString()}
	raw, err := json.Marshal(sessionRecord{ID: s.id, Address: address, Holder: ownProcess()})
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "encode a record: %w", err)
	}
	op := rados.CreateWriteOp()
	defer op.Release()
	op.WriteFull(pad(s.id))
	op.SetOmap(map[string][]byte{keySession: raw})
	if err := op.Operate(c.pool, oid, rados.OperationNoFlag); err != nil {
		return nil, wrap(err, "begin a session with the store")
	}
	return s, nil
}

// take takes the lock and fences whoever had it.
func (s *session) take(lease time.Duration) error {
	for try := 0; ; try++ {
		before, err := s.record()
		if err != nil {
			return err
		}
		free, err := s.lock(lease, 0)
		switch {
		case err != nil:
			return err
		case free:
			// Again, now that nobody else can begin one. One that did not end its session has
			// run out of its lease, or its lock was broken here.
			if before, err = s.record(); err != nil || before == nil {
				return err
			}
			return blocklist(s.c.conn, before.Address)
		case try >= 3:
			return kind.Errorf(kind.InUse, "another process is taking the store %s", s.oid)
		case before == nil:
			// It is just beginning or ending.
			time.Sleep(100 * time.Millisecond)
			continue
		case !before.Holder.dead():
			return kind.Errorf(kind.InUse, "process %d on %s has the store %s; should it be gone, the store is free after %v",
				before.Holder.Pid, before.Holder.Host, s.oid, lease)
		}
		info, err := s.c.pool.ListLockers(s.oid, lockName)
		if err != nil && !isNotFound(err) {
			return wrap(err, "ask who has the store")
		}
		if info == nil {
			continue
		}
		for i, client := range info.Clients {
			if i < len(info.Cookies) {
				if _, err := s.c.pool.BreakLock(s.oid, lockName, client, info.Cookies[i]); err != nil {
					return wrap(err, "break a dead process's lock on the store")
				}
			}
		}
	}
}

// record returns the session on record, nil for none.
func (s *session) record() (*sessionRecord, error) {
	values, err := s.c.pool.GetOmapValues(s.oid, "", keySession, 1)
	if err != nil {
		return nil, wrap(err, "read the index %s", s.oid)
	}
	raw, ok := values[keySession]
	if !ok {
		return nil, nil
	}
	r := &sessionRecord{}
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, kind.Errorf(kind.Corrupt, "record %s of the index %s is damaged: %w", keySession, s.oid, err)
	}
	return r, nil
}

// blocklist has Ceph refuse a client from now on, and this one know of it.
func blocklist(conn *rados.Conn, address string) error {
	if address == "" {
		return nil
	}
	command, err := json.Marshal(map[string]string{"prefix": "osd blocklist", "blocklistop": "add", "addr": address, "format": "json"})
	if err != nil {
		return kind.Errorf(kind.Invalid, "encode a command: %w", err)
	}
	if _, status, err := conn.MonCommand(command); err != nil {
		return wrap(err, "put client %s of a dead process on Ceph's blocklist: %s", address, status)
	}
	return wrap(conn.WaitForLatestOSDMap(), "wait for the map of Ceph's OSDs")
}

// renew says that the process lives. It waits while the cluster is away.
func (s *session) renew(lease time.Duration) error {
	got, err := s.lock(lease, mayRenew)
	if errno(err) == errBlocklisted || err == nil && !got {
		s.lost.Store(true)
	}
	if err == nil && !got {
		err = kind.Errorf(kind.Unavailable, "another process has taken over the store %s", s.oid)
	}
	return err
}

// lock takes or renews the lock, and tells whether it is this process's now.
func (s *session) lock(lease time.Duration, flags byte) (bool, error) {
	result, err := s.c.pool.LockExclusive(s.oid, lockName, lockCookie, "thaw store", lease, &flags)
	switch {
	case err != nil:
		return false, wrap(err, "lock the store %s", s.oid)
	case result == -int(syscall.EBUSY), result == -int(syscall.EEXIST):
		return false, nil
	}
	return true, nil
}

// write changes the index in one operation, if the store is this session's.
func (s *session) write(set map[string][]byte, removed []string) error {
	if s.lost.Load() {
		return kind.Errorf(kind.Unavailable, "another process has taken over the store %s", s.oid)
	}
	op := rados.CreateWriteOp()
	defer op.Release()
	op.CmpExt(pad(s.id), 0)
	if len(set) > 0 {
		op.SetOmap(set)
	}
	if len(removed) > 0 {
		op.RmOmapKeys(removed)
	}
	err := op.Operate(s.c.pool, s.oid, rados.OperationNoFlag)
	if n := errno(err); n >= errCompare || n == errBlocklisted {
		s.lost.Store(true)
	}
	return wrap(err, "change the index %s", s.oid)
}

// end gives the store back.
func (s *session) end() error {
	if s.lost.Load() {
		return nil
	}
	err := s.write(nil, []string{keySession})
	_, uerr := s.c.pool.Unlock(s.oid, lockName, lockCookie)
	return errors.Join(err, wrap(uerr, "unlock the store"))
}

// keep renews until ctx ends.
func (s *session) keep(ctx context.Context, lease time.Duration, failed func(error)) {
	tick := time.NewTicker(lease / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := s.renew(lease); err != nil {
			failed(err)
			if s.lost.Load() {
				return
			}
		}
	}
}
