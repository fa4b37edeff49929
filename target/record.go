package target

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/statedb"
	"github.com/thaw-project/thaw/target/rpc"
)

// With Options.Persist every object is on record in <root>/target.db as the call that
// makes it: bucket "object", by key the class, two digits, then the object's names, each
// after a zero byte; the value is an object in JSON. The order of keys is the order in
// which calls are made again.
//
// A call that creates is recorded after it succeeded and before it is answered; one that
// removes is taken off the record first. So whoever is killed in between leaves either
// what was there before or what was asked for, and in both cases nobody was told
// anything.
const (
	classMemory     = 10
	classNull       = 15
	classFile       = 20
	classRemote     = 30
	classTransport  = 40
	classSubsystem  = 50
	classHost       = 60
	classNamespace  = 70
	classUblkTarget = 80
	classKernel     = 85
	classSocket     = 87 // after the nvmeNamespaces in whose claim it has part
	classListener   = 90 // last: who connects finds everything
)

const (
	recordVersion = 1

	// maxObjects bounds what is restored, and with it the time a start takes.
	maxObjects = 1 << 20
)

var objectBucket = []byte("object")

// object is a call on record.
type object struct {
	Method string          `json:"method"`
	Params json.RawMessage `json:"params"`

	key    string
	said   string    // the failure that was logged last
	saidAt time.Time // when
}

func objectKey(class int, names ...string) string {
	return fmt.Sprintf("%02d\x00%s", class, strings.Join(names, "\x00"))
}

// printable is a key for a log.
func printable(key string) string { return strings.ReplaceAll(key, "\x00", " ") }

func (t *Target) openRecord() (err error) {
	t.db, err = statedb.Open(statedb.Options{Path: filepath.Join(t.o.Root, "target.db"), Part: "target", Version: recordVersion, Buckets: []string{"object"}})
	return err
}

// keep records a call that succeeded. When it cannot, the caller undoes the call. The
// caller holds admin.
func (t *Target) keep(class int, name, method string, params any) error {
	return t.keepAs(objectKey(class, name), method, params)
}

func (t *Target) keepAs(key, method string, params any) error {
	delete(t.pending, key)
	if t.db == nil || t.replaying {
		return nil
	}
	failpoint.Reach("target.record: made")
	raw, err := json.Marshal(params)
	if err != nil {
		return rpc.Internal("", err)
	}
	value, err := json.Marshal(object{Method: method, Params: raw})
	if err != nil {
		return rpc.Internal("", err)
	}
	err = t.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(objectBucket).Put([]byte(key), value) })
	if err != nil {
		return errnoOf(fmt.Errorf("record %s: %w", printable(key), err))
	}
	failpoint.Reach("target.record: recorded")
	return nil
}

// forget takes an object off the record. The caller holds admin.
func (t *Target) forget(class int, names ...string) error {
	return t.forgetKeys(objectKey(class, names...))
}

// forgetKeys takes objects off the record, in one transaction: those of the keys, and
// those whose keys go on with a zero byte after one.
func (t *Target) forgetKeys(keys ...string) error {
	match := func(k string) bool {
		return slices.ContainsFunc(keys, func(key string) bool { return k == key || strings.HasPrefix(k, key+"\x00") })
	}
	if t.db != nil && !t.replaying {
		err := t.db.Update(func(tx *bbolt.Tx) error { return deleteKeys(tx.Bucket(objectBucket), keys, match) })
		if err != nil {
			return errnoOf(fmt.Errorf("take %s off the record: %w", printable(keys[0]), err))
		}
		failpoint.Reach("target.record: forgotten")
	}
	maps.DeleteFunc(t.pending, func(k string, _ object) bool { return match(k) })
	return nil
}

func deleteKeys(b *bbolt.Bucket, keys []string, match func(string) bool) error {
	var doomed [][]byte // a cursor does not survive a deletion
	for _, key := range keys {
		c := b.Cursor()
		for k, _ := c.Seek([]byte(key)); k != nil && strings.HasPrefix(string(k), key); k, _ = c.Next() {
			if match(string(k)) {
				doomed = append(doomed, slices.Clone(k))
			}
		}
	}
	for _, k := range doomed {
		if err := b.Delete(k); err != nil {
			return err
		}
	}
	return nil
}

// lost puts an object that went without anybody asking for it among those to be made
// again. The caller holds admin.
func (t *Target) lost(key string) {
	if t.db == nil || t.closed {
		return
	}
	var o object
	err := t.db.View(func(tx *bbolt.Tx) error {
		v := tx.Bucket(objectBucket).Get([]byte(key))
		if v == nil {
			return kind.Errorf(kind.NotFound, "%s is not on record", printable(key))
		}
		return json.Unmarshal(v, &o)
	})
	if err != nil {
		t.log.Error("object will not come back", "object", printable(key), "err", err)
		return
	}
	o.key = key
	t.pending[key] = o
	t.kick()
}

// isPending tells whether an object is on record and not made.
func (t *Target) isPending(class int, names ...string) bool {
	_, ok := t.pending[objectKey(class, names...)]
	return ok
}

// restore makes the calls on record again, and starts the goroutine that retries those
// that fail.
func (t *Target) restore() error {
	list, err := t.recorded()
	if err != nil {
		return err
	}
	t.admin.Lock()
	defer t.admin.Unlock()
	for _, o := range list {
		t.pending[o.key] = o
	}
	// Remote controllers are connected beside this: one that does not answer must not
	// keep the others away.
	graceEnds := time.Now().Add(t.o.ListenerGrace)
	t.retry(graceEnds)
	if n := len(t.pending); len(list) > 0 {
		t.log.Info("configuration restored", "objects", len(list)-n, "waiting", n)
	}
	t.wg.Add(1)
	go t.retrier(graceEnds)
	return nil
}

func (t *Target) recorded() (list []object, err error) {
	err = t.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(objectBucket).ForEach(func(k, v []byte) error {
			var o object
			if err := json.Unmarshal(v, &o); err != nil {
				return kind.Errorf(kind.Corrupt, "object %s: %w", printable(string(k)), err)
			}
			o.key = string(k)
			list = append(list, o)
			if len(list) > maxObjects {
				return kind.Errorf(kind.Corrupt, "more than %d objects", maxObjects)
			}
			return nil
		})
	})
	if err != nil {
		err = fmt.Errorf("configuration on record: %w", err)
	}
	return list, err
}

// kick makes the retrier look soon.
func (t *Target) kick() {
	select {
	case t.kicked <- struct{}{}:
	default:
	}
}

func (t *Target) retrier(graceEnds time.Time) {
	defer t.wg.Done()
	tick := time.NewTicker(t.o.RetryInterval)
	defer tick.Stop()
	for {
		select {
		case <-t.ctx.Done():
			return
		case <-tick.C:
		case <-t.kicked:
		}
		t.admin.Lock()
		if !t.closed {
			t.retry(graceEnds)
		}
		t.admin.Unlock()
	}
}

// retry makes the calls of all pending objects, in order. The caller holds admin.
func (t *Target) retry(graceEnds time.Time) {
	for _, key := range slices.Sorted(maps.Keys(t.pending)) {
		o, ok := t.pending[key]
		if !ok {
			continue // another call took it along
		}
		var err error
		switch {
		case strings.HasPrefix(key, objectKey(classRemote)):
			t.reconnect(o)
			continue
		case strings.HasPrefix(key, objectKey(classListener)) && time.Now().Before(graceEnds) && t.waitsFor(key):
			err = kind.Errorf(kind.Unavailable, "nvmeNamespaces of its subsystem are still missing")
		default:
			err = t.replay(o)
		}
		if err == nil {
			delete(t.pending, key)
			if o.said != "" {
				t.log.Info("restored after all", "object", printable(key))
			}
			continue
		}
		o.complain(t, err)
	}
}

// sayAgain is how often the same failure of the same object is logged.
const sayAgain = time.Minute

func (o object) complain(t *Target, err error) {
	if o.said != err.Error() || time.Since(o.saidAt) > sayAgain {
		t.log.Error("not restored yet; it stays on record and is tried again", "object", printable(o.key), "method", o.Method, "err", err)
		o.said, o.saidAt = err.Error(), time.Now()
	}
	if _, ok := t.pending[o.key]; ok {
		t.pending[o.key] = o
	}
}

// waitsFor tells whether nvmeNamespaces of a listener's subsystem are pending.
func (t *Target) waitsFor(listener string) bool {
	nqn := strings.SplitN(listener, "\x00", 3)[1]
	for key := range t.pending {
		if strings.HasPrefix(key, objectKey(classNamespace, nqn)+"\x00") {
			return true
		}
	}
	return false
}

// replay makes a recorded call. The caller holds admin.
func (t *Target) replay(o object) error {
	body, ok := t.bodies()[o.Method]
	if !ok {
		return kind.Errorf(kind.Unsupported, "no method %s", o.Method)
	}
	t.replaying = true
	defer func() { t.replaying = false }()
	_, err := body(o.Params)
	return err
}

// bodies are the methods that are recorded, for callers that hold admin.
func (t *Target) bodies() map[string]func(json.RawMessage) (any, error) {
	return map[string]func(json.RawMessage) (any, error){
		"bdev_aio_create":             t.createFile,
		"bdev_malloc_create":          t.createMemory,
		"bdev_null_create":            t.createNull,
		"nvmf_create_transport":       t.createTransport,
		"nvmf_create_subsystem":       t.createSubsystem,
		"nvmf_subsystem_add_host":     t.addHost,
		"nvmf_subsystem_add_ns":       t.addNvmeNamespace,
		"nvmf_subsystem_add_listener": t.addListener,
		"ublk_create_target":          t.createUblkTarget,
		"ublk_start_disk":             t.startUblk,
		"nbd_start_disk":              t.startNBD,
		"thaw_nbd_export":             t.exportSocket,
	}
}
