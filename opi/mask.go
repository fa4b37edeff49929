package opi

import (
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/thaw-project/thaw/kind"
)

// masked returns have with the fields of want that the mask names (aip.dev/134), for an
// update. No mask means the fields of want that are set; "*" means all.
func masked[M proto.Message](have, want M, mask *fieldmaskpb.FieldMask) (M, error) {
	out := proto.CloneOf(have)
	paths := mask.GetPaths()
	switch {
	case len(paths) == 1 && paths[0] == "*":
		name := out.ProtoReflect().Descriptor().Fields().ByName("name")
		id := out.ProtoReflect().Get(name)
		out = proto.CloneOf(want)
		out.ProtoReflect().Set(name, id)
	case len(paths) == 0:
		proto.Merge(out, want)
	default:
		if !mask.IsValid(have) {
			return out, kind.Errorf(kind.Invalid, "update_mask %.200q names what %s does not have", paths, have.ProtoReflect().Descriptor().Name())
		}
		for _, p := range paths {
			copyField(out.ProtoReflect(), want.ProtoReflect(), p)
		}
	}
	return out, nil
}

// copyField copies the field at a path, whose parts are known to exist.
func copyField(to, from protoreflect.Message, path string) {
	for {
		part, rest, deeper := cut(path)
		f := to.Descriptor().Fields().ByName(protoreflect.Name(part))
		if !deeper {
			if from.Has(f) {
				to.Set(f, from.Get(f))
			} else {
				to.Clear(f)
			}
			return
		}
		to, from, path = to.Mutable(f).Message(), from.Get(f).Message(), rest
	}
}

func cut(path string) (part, rest string, deeper bool) {
	for i := range len(path) {
		if path[i] == '.' {
			return path[:i], path[i+1:], true
		}
	}
	return path, "", false
}

// unchangeable is the update of what the target cannot change: it succeeds when nothing
// would change.
func unchangeable[M proto.Message](have, want M, mask *fieldmaskpb.FieldMask) (M, error) {
	out, err := masked(have, want, mask)
	if err != nil {
		return have, err
	}
	if !proto.Equal(out, have) {
		return have, kind.Errorf(kind.Unsupported, "the target cannot change a %s: delete it and create another", have.ProtoReflect().Descriptor().Name())
	}
	return have, nil
}
