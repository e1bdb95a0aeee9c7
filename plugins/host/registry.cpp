#include "registry.h"

#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "log.h"
#include "plugin.h"

namespace nemo {

namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

PluginFieldType field_type(AttributeRow const& row) {
    return row.is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
}

// Returns the attribute's value. Throws PluginError if it is missing or not a single number of its type.
Attribute read(AttributeRow const& row, PluginFieldCollection const& given) {
    for (int32_t i = 0; i < given.nbFields; ++i) {
        PluginField const& field = given.fields[i];
        if (std::strcmp(field.name, row.name)) continue;
        if (field.type != field_type(row) || field.length != 1 || !field.data) {
            throw PluginError(std::string("attribute ") + row.name + " must be a single " +
                              (row.is_float ? "float" : "int"));
        }
        Attribute value;
        if (row.is_float) std::memcpy(&value.real, field.data, sizeof value.real);
        else std::memcpy(&value.integer, field.data, sizeof value.integer);
        return value;
    }
    throw PluginError(std::string("attribute ") + row.name + " is missing");
}

void refuse_unknown(OpRow const& op, PluginFieldCollection const& given) {
    for (int32_t i = 0; i < given.nbFields; ++i) {
        bool known = false;
        for (AttributeRow const& row : op.attributes) known = known || !std::strcmp(row.name, given.fields[i].name);
        if (!known) throw PluginError(std::string("there is no attribute ") + given.fields[i].name);
    }
}

class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit Creator(OpRow const& op) : op_(op), names_{} {
        for (AttributeRow const& row : op.attributes) fields_.emplace_back(row.name, nullptr, field_type(row), 1);
        names_.nbFields = static_cast<int32_t>(fields_.size());
        names_.fields = fields_.data();
    }

    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, PluginFieldCollection const* given,
                                      nvinfer1::TensorRTPhase) noexcept override {
        try {
            PluginFieldCollection const none{};
            PluginFieldCollection const& fields = given ? *given : none;
            refuse_unknown(op_, fields);
            std::vector<Attribute> attributes;
            for (AttributeRow const& row : op_.attributes) attributes.push_back(read(row, fields));
            return new Plugin(op_, name ? name : "", std::move(attributes));
        } catch (std::exception const& error) {
            log_error(op_.name, name ? name : "", error.what());
            return nullptr;
        }
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return &names_; }
    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return op_.name; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    OpRow const& op_;
    std::vector<PluginField> fields_;
    PluginFieldCollection names_;
};

struct Creators {
    std::vector<std::unique_ptr<Creator>> owned;
    std::vector<nvinfer1::IPluginCreatorInterface*> listed;

    Creators() {
        for (OpRow const& op : kOps) {
            owned.push_back(std::make_unique<Creator>(op));
            listed.push_back(owned.back().get());
        }
    }
};

}  // namespace

}  // namespace nemo

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static nemo::Creators const creators;
    count = static_cast<int32_t>(creators.listed.size());
    return creators.listed.data();
}

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { nemo::set_logger_finder(finder); }

extern "C" char const* nemo_plugin_describe() { return nemo::kDescription; }
